/* How many iterations of each step let an engine optimise its kernel. */
static const uint32_t warm_ups[] = {@warm_ups@};

/* Before the first inference: what buffers hold is lost. */
API int @prefix@_warm_up(const void *const *inputs, void *const *outputs, void *arena) {
    int status = check(inputs, outputs, arena);
    for (size_t i = 0; status == @PREFIX@_OK && i < @step_count@u; i++)
        if (warm_ups[i]) execute(i, inputs, outputs, arena, (int)warm_ups[i]);
    return status;
}
