/* Runs the model once on zeros and prints the start of each output. Build and run, in this folder:
 *
 *   cc -O2 example.c model.a@libraries@ -o example && ./example
 */
#define _POSIX_C_SOURCE 200112L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

static void *aligned(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, @PREFIX@_ALIGNMENT, bytes ? bytes : 1) != 0) abort();
    memset(memory, 0, bytes);
    return memory;
}

int main(void) {
    void *weights = aligned(@prefix@_weights_bytes());
    FILE *file = fopen("weights.bin", "rb");
    if (!file || fread(weights, 1, @prefix@_weights_bytes(), file) != @prefix@_weights_bytes() ||
        @prefix@_init(weights, @prefix@_weights_bytes()) != @PREFIX@_OK) {
        fprintf(stderr, "weights.bin is missing or belongs to another model\n");
        return 2;
    }
    fclose(file);

    const void *inputs[@input_slots@];
    void *outputs[@output_slots@];
    for (size_t i = 0; i < @prefix@_input_count(); i++)
        inputs[i] = aligned(@prefix@_input(i)->bytes);
    for (size_t i = 0; i < @prefix@_output_count(); i++)
        outputs[i] = aligned(@prefix@_output(i)->bytes);
    void *arena = aligned(@prefix@_arena_bytes()); /* one per thread */

    if (@prefix@_run(inputs, outputs, arena) != @PREFIX@_OK) return 3;

    for (size_t i = 0; i < @prefix@_output_count(); i++) {
        const @prefix@_tensor *t = @prefix@_output(i);
        printf("%s (%s):", t->name, t->dtype);
        if (strcmp(t->dtype, "float32") == 0)
            for (size_t k = 0; k < t->bytes / sizeof(float) && k < 10; k++)
                printf(" %g", (double)((const float *)outputs[i])[k]);
        printf("\n");
    }
    return 0;
}
