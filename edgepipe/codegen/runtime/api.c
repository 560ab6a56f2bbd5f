#if defined(__GNUC__)
#define API __attribute__((visibility("default")))
#else
#define API
#endif

@inputs@

@outputs@

static int misaligned(const void *pointer) {
    return pointer == NULL || (uintptr_t)pointer % @alignment@ != 0;
}

/* Bytes are put together one by one: the file is little-endian whatever the machine is. */
static uint64_t word(const unsigned char *bytes) {
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--) value = value << 8 | bytes[i];
    return value;
}

/* Whether these are the weights that belong to the kernels. */
static int check_weights(const void *weights, size_t bytes) {
    const unsigned char *header = (const unsigned char *)weights;
    if (misaligned(weights)) return @PREFIX@_ERROR_ALIGNMENT;
    if (bytes < @alignment@u) return @PREFIX@_ERROR_SIZE;
    if (word(header) != @weights_magic@ || word(header + 8) != @weights_hash@)
        return @PREFIX@_ERROR_WRONG_WEIGHTS;
    return bytes == @weights_bytes@u ? @PREFIX@_OK : @PREFIX@_ERROR_SIZE;
}

API const char *@prefix@_version(void) { return @version@; }

API size_t @prefix@_weights_bytes(void) { return @weights_bytes@u; }

API size_t @prefix@_arena_bytes(void) { return @arena_bytes@u; }

API size_t @prefix@_input_count(void) { return @input_count@u; }

API size_t @prefix@_output_count(void) { return @output_count@u; }

API const @prefix@_tensor *@prefix@_input(size_t index) {
    return index < @input_count@u ? &input_tensors[index] : NULL;
}

API const @prefix@_tensor *@prefix@_output(size_t index) {
    return index < @output_count@u ? &output_tensors[index] : NULL;
}
