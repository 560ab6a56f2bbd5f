/* A CUDA driver for checks. With the kernels of a bundle, compiled for the CPU, it executes them;
 * without (RECORDING) it accepts every name. What is called goes to STUB_LOG, a line each.
 *
 * STUB_DRIVER (10020), STUB_CAPABILITY (62), STUB_DEVICES (1), STUB_REFUSES ("cubin", "ptx",
 * "graph", "memory") say what kind of driver and GPU it is.
 */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
enum { INVALID_IMAGE = 200, OUT_OF_MEMORY = 2, NOT_FOUND = 500, CAPTURE_FAILED = 901 };

typedef struct {
    const char *name;
    int arguments;
    void (*run)(void **arguments, int x, int y, int z, int threads, unsigned seed);
} kernel;
#ifdef RECORDING
static const kernel stub_kernels[1];
static const int stub_kernel_count = 0;
#else
extern const kernel stub_kernels[];
extern const int stub_kernel_count;
#endif

typedef struct {
    const kernel *function;
    void *arguments[32];
    int blocks[3], threads;
} call;
typedef struct { call calls[4096]; int count; } sequence;
static sequence *capturing;

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int refuses(const char *what) {
    const char *text = getenv("STUB_REFUSES");
    return text && strstr(text, what) != NULL;
}

static void note(const char *format, ...) {
    const char *path = getenv("STUB_LOG");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    va_list values;
    va_start(values, format);
    vfprintf(file, format, values);
    va_end(values);
    fputc('\n', file);
    fclose(file);
}

static int execute(const call *c) {
    note("run %s", c->function->name);
    if (c->function->run)
        c->function->run((void **)c->arguments, c->blocks[0], c->blocks[1], c->blocks[2],
                         c->threads, 1);
    return 0;
}

EXPORT int cuInit(unsigned flags) { return (int)flags; }
EXPORT int cuDriverGetVersion(int *version) { return *version = number("STUB_DRIVER", 10020), 0; }
EXPORT int cuGetErrorName(int status, const char **name) {
    *name = status == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
            : status == INVALID_IMAGE ? "CUDA_ERROR_INVALID_IMAGE" : "CUDA_ERROR_OTHER";
    return 0;
}
EXPORT int cuDeviceGetCount(int *count) { return *count = number("STUB_DEVICES", 1), 0; }
EXPORT int cuDeviceGet(int *device, int index) { return *device = index, 0; }
EXPORT int cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, (size_t)size, "stub %d", device);
    return 0;
}
EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    return *bytes = (size_t)4 << 30, device;
}
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int capability = number("STUB_CAPABILITY", 62);
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10
             : attribute == 16 ? 2 : attribute == 37 ? 128 : 1000000; /* 13, 36: kHz */
    return device;
}
EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) {
    return *context = malloc(1), device;
}
EXPORT int cuDevicePrimaryCtxRelease(int device) { return device; }
static int depth;
EXPORT int cuCtxPushCurrent_v2(void *context) { return depth++, context == NULL; }
EXPORT int cuCtxPopCurrent_v2(void **context) { return *context = NULL, --depth < 0; }

EXPORT int cuModuleLoadDataEx(void **module, const void *image, unsigned count, int *options,
                              void **values) {
    const char *text = (const char *)image;
    int binary = memcmp(text, "\177ELF", 4) == 0;
    (void)count, (void)options;
    note("module %s", binary ? "cubin" : "ptx");
    if ((uintptr_t)image % 8 || depth != 1) return INVALID_IMAGE;
    if (refuses(binary ? "cubin" : "ptx")) {
        if (!binary && count) strcpy((char *)values[0], "ptxas fatal: stub");
        return INVALID_IMAGE;
    }
    if (!binary && !strstr(text, ".version")) return INVALID_IMAGE;
    return *module = (void *)image, 0;
}
EXPORT int cuModuleUnload(void *module) { return module == NULL; }
EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module;
    for (int i = 0; i < stub_kernel_count; i++)
        if (strcmp(stub_kernels[i].name, name) == 0) return *function = (void *)&stub_kernels[i], 0;
#ifdef RECORDING
    kernel *found = (kernel *)calloc(1, sizeof(kernel));
    found->name = name;
    return *function = found, 0;
#endif
    return NOT_FOUND;
}

EXPORT int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    void *memory = NULL;
    note("allocate %zu", bytes);
    if (refuses("memory") || posix_memalign(&memory, 256, bytes)) return OUT_OF_MEMORY;
    memset(memory, 255, bytes); /* not a number, so that a hole shows */
    return *address = (uint64_t)(uintptr_t)memory, 0;
}
EXPORT int cuMemFree_v2(uint64_t address) { return free((void *)(uintptr_t)address), 0; }
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    note("upload %zu", bytes);
    return memcpy((void *)(uintptr_t)to, from, bytes), stream == NULL;
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    note("download %zu", bytes);
    return memcpy(to, (void *)(uintptr_t)from, bytes), stream == NULL;
}

EXPORT int cuStreamCreate(void **stream, unsigned flags) { return *stream = malloc(1), flags != 1; }
EXPORT int cuStreamSynchronize(void *stream) { return stream == NULL; }
EXPORT int cuStreamDestroy_v2(void *stream) { return free(stream), 0; }
EXPORT int cuEventCreate(void **event, unsigned flags) {
    return *event = calloc(1, sizeof(struct timespec)), (int)flags;
}
EXPORT int cuEventRecord(void *event, void *stream) {
    return clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event), stream == NULL;
}
EXPORT int cuEventElapsedTime(float *ms, void *from, void *to) {
    const struct timespec *a = (struct timespec *)from, *b = (struct timespec *)to;
    *ms = (float)((double)(b->tv_sec - a->tv_sec) * 1e3 + (double)(b->tv_nsec - a->tv_nsec) * 1e-6);
    return 0;
}
EXPORT int cuEventDestroy_v2(void *event) { return free(event), 0; }

EXPORT int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned tx,
                          unsigned ty, unsigned tz, unsigned shared, void *stream,
                          void **parameters, void **extra) {
    call c = {(const kernel *)function, {0}, {(int)x, (int)y, (int)z}, (int)(tx * ty * tz)};
    if (shared || extra || !stream || c.threads > 1024 || y > 65535 || z > 65535) return 1;
    for (int i = 0; i < c.function->arguments; i++)
        c.arguments[i] = (void *)(uintptr_t) * (uint64_t *)parameters[i];
    if (!capturing) return execute(&c);
    if (capturing->count == 4096) return CAPTURE_FAILED;
    return capturing->calls[capturing->count++] = c, 0;
}

EXPORT int cuStreamBeginCapture_v2(void *stream, int mode) {
    if (refuses("graph")) return CAPTURE_FAILED;
    return capturing = (sequence *)calloc(1, sizeof(sequence)), stream == NULL || mode > 2;
}
EXPORT int cuStreamEndCapture(void *stream, void **graph) {
    return *graph = capturing, capturing = NULL, stream == NULL;
}
EXPORT int cuGraphInstantiate(void **executable, void *graph, void **node, char *log, size_t size) {
    if (node || log || size) return 1;
    note("graph of %d", ((sequence *)graph)->count);
    *executable = malloc(sizeof(sequence));
    return memcpy(*executable, graph, sizeof(sequence)), 0;
}
EXPORT int cuGraphLaunch(void *executable, void *stream) {
    const sequence *s = (sequence *)executable;
    note("launch graph");
    for (int i = 0; i < s->count; i++) execute(&s->calls[i]);
    return stream == NULL;
}
EXPORT int cuGraphDestroy(void *graph) { return free(graph), 0; }
EXPORT int cuGraphExecDestroy(void *executable) { return free(executable), 0; }
