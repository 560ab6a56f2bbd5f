/* One part of an inference alone, for benchmarks/threads.py: parts REPETITIONS PART PARTS WEIGHTS.
 *
 * Nobody waits, so the results are wrong, but the work is that of the part. Prints, per stretch of
 * work between two meetings, the least CPU time of the repetitions in microseconds.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "model.h"

#define MOST 4096

static double least[MOST], last;
static int stretch;

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static void wait(void *context) {
    double now = now_us();
    (void)context;
    if (stretch < MOST && (least[stretch] == 0 || now - last < least[stretch]))
        least[stretch] = now - last;
    stretch++;
    last = now_us();
}

static void *allocate(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, MODEL_ALIGNMENT, bytes + MODEL_ALIGNMENT) != 0) exit(3);
    memset(memory, 0, bytes);
    return memory;
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    void *weights = allocate(model_weights_bytes()), *arena = allocate(model_arena_bytes());
    void *inputs[64], *outputs[64];
    FILE *file = fopen(argv[4], "rb");
    if (!file || fread(weights, 1, model_weights_bytes(), file) != model_weights_bytes()) return 4;
    if (model_init(weights, model_weights_bytes()) != MODEL_OK) return 5;
    for (size_t i = 0; i < model_input_count(); i++) {
        inputs[i] = allocate(model_input(i)->bytes);
        float *values = inputs[i];
        for (size_t k = 0; k < model_input(i)->bytes / 4; k++) values[k] = (float)(k % 17) / 8 - 1;
    }
    for (size_t i = 0; i < model_output_count(); i++)
        outputs[i] = allocate(model_output(i)->bytes);
    for (int r = 0; r < atoi(argv[1]); r++) {
        stretch = 0;
        last = now_us();
        if (model_run_part((const void *const *)inputs, outputs, arena, atoi(argv[2]),
                           atoi(argv[3]), wait, NULL) != MODEL_OK)
            return 6;
    }
    for (int i = 0; i < stretch && i < MOST; i++) printf("%.3f\n", least[i]);
    return 0;
}
