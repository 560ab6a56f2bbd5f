
/* Steps behind which all threads meet: where they share the step, or the next one. */
static const unsigned char meets[] = {@meets@};

API int @prefix@_run_part(const void *const *inputs, void *const *outputs, void *arena, int part,
                          int parts, @prefix@_wait wait, void *context) {
    int status = check(inputs, outputs, arena);
    if (parts < 1 || parts > @PREFIX@_MOST_THREADS || part < 0 || part >= parts)
        status = @PREFIX@_ERROR_PARTS;
    for (size_t i = 0; status == @PREFIX@_OK && i < @step_count@u; i++) {
        execute(i, inputs, outputs, arena, part, parts);
        if (meets[i]) wait(context);
    }
    wait(context);
    return status;
}
