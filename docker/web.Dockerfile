# The demo page behind a static file server, and nothing else.
ARG BASE=debian:bookworm-slim
ARG EDGEPIPE=edgepipe

FROM ${EDGEPIPE} AS site
RUN ["edgepipe", "demo", "--quiet", "-o", "/tmp/site"]

FROM ${BASE} AS server
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends busybox-static >/dev/null \
 && printf '.mjs:text/javascript\n.wasm:application/wasm\n.json:application/json\n' > /httpd.conf

FROM scratch
COPY --from=server /bin/busybox /httpd.conf /
COPY --from=site /tmp/site /site
USER 1000
EXPOSE 8080
HEALTHCHECK --interval=1m --timeout=5s \
    CMD ["/busybox", "wget", "-q", "--spider", "http://127.0.0.1:8080/"]
ENTRYPOINT ["/busybox", "httpd", "-f", "-c", "/httpd.conf", "-h", "/site", "-p"]
CMD ["8080"]
