
/* Only of models on a GPU. `arena` of @prefix@_run is not used and may be null; weights may be freed
 * after @prefix@_init, which takes the first GPU. EDGEPIPE_LIBCUDA names the driver's library where
 * the system does not find libcuda.so.1. Link with -ldl -lpthread. */
#define @PREFIX@_GPU 1
#define @PREFIX@_ERROR_GPU 5 /* @prefix@_error() says what */

const char *@prefix@_error(void);  /* what went wrong last */
const char *@prefix@_gpu(void);    /* the GPU, its driver, and which code runs; after init */
float @prefix@_gpu_ms(void);       /* time of the kernels of the last run, by events on the GPU */
size_t @prefix@_gpu_bytes(void);   /* GPU memory for weights and tensors, one block */
void @prefix@_release(void);       /* gives the GPU memory back; @prefix@_init takes it again */
