/* One inference by several threads, see pool.h for some that are there already. Each of `parts`
 * threads calls @prefix@_run_part with the same buffers and its own `part` from 0 on; `wait`
 * returns once all of them have called it, with all memory written before seen by all after.
 * Results have the same bits whatever `parts` is; they are there when the calls return. */
#define @PREFIX@_THREADS @threads@       /* as compiled; 0: as many as the machine has */
#define @PREFIX@_MOST_THREADS @most_threads@ /* the arena has room for so many */
#define @PREFIX@_ERROR_PARTS 6 /* `parts` is not 1 to @PREFIX@_MOST_THREADS, or `part` not below it */
typedef void (*@prefix@_wait)(void *context);
int @prefix@_run_part(const void *const *inputs, void *const *outputs, void *arena, int part,
                      int parts, @prefix@_wait wait, void *context);

