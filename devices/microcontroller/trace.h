/* Included before the generated network: counts its instructions by step and part. */
#include <stdint.h>
void trace_mark(int32_t kind);
void trace_step(int32_t step);
#define NN_TRACE(kind) trace_mark(kind)
#define NN_STEP(step) trace_step(step)
