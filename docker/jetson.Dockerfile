# A bundle on NVIDIA's L4T, to run on the board. The build context `bundle` is its folder.
ARG L4T
FROM ${L4T}
COPY --from=bundle . /opt/bundle
# The GPU's device files belong to the group `video`, 44 in Ubuntu.
USER 1000:44
WORKDIR /opt/bundle
HEALTHCHECK --interval=5m --timeout=60s CMD ["./bench", "--runs", "1", "--warmup", "0"]
ENTRYPOINT ["./bench"]
CMD ["--runs", "100"]
