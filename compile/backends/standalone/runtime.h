/* What compiled kernels and a generated model need on the device: memory, threads and checks.
 *
 * C (gnu11) over libc and pthread; no constructors, environment variables or output. Every
 * symbol is hidden in the finished library, so each model has a copy of its own.
 *
 * A model is a const nn_model. An instance is one block of memory: its tensors, its arena, and
 * for each thread a stack of workspaces. Kernels are TVM's (tvm/runtime/c_backend_api.h).
 */
#ifndef NN_RUNTIME_H
#define NN_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#define NN_ALIGNMENT 64  /* of memory, weights and workspaces: TVM's kAllocAlignment */
#define NN_MAX_THREADS 64
#define NN_MAX_INSTANCES 256 /* alive at a time, of one model in one process */
#define NN_MAX_ARGUMENTS 128 /* of one kernel */

typedef enum {
  NN_OK = 0,
  NN_NULL_POINTER,
  NN_MISALIGNED,
  NN_OVERLAP,
  NN_BUSY,
  NN_NO_MEMORY,
  NN_MEMORY_TOO_SMALL,
  NN_BAD_THREADS,
  NN_TOO_MANY_INSTANCES,
  NN_NOT_AN_INSTANCE,
  NN_CPU_LACKS_FEATURES,
  NN_KERNEL_FAILED,
  NN_WEIGHTS_DAMAGED,
  NN_GOLDEN_MISMATCH,
  NN_INPUT_NOT_FINITE
} nn_error;

/* One line of text for a code, for any int. */
const char *nn_error_text(int code);

/* ---- What the kernels see: dlpack's DLTensor and TVM's TVMValue ---- */

typedef struct {
  void *data;
  struct {
    int32_t device_type, device_id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape;
  int64_t *strides;
  uint64_t byte_offset;
} nn_dltensor;

typedef union {
  int64_t v_int64;
  double v_float64;
  void *v_handle;
} nn_value;

typedef int32_t nn_kernel(void *args, int32_t *type_codes, int32_t num_args,
                          void *out_value, int32_t *out_type_code, void *resource);

/* ---- What the generated file describes ---- */

typedef struct nn_instance nn_instance;

typedef enum { NN_ARENA, NN_WEIGHTS, NN_INPUT, NN_OUTPUT } nn_place;
enum { NN_INT = 0, NN_UINT = 1, NN_FLOAT = 2 }; /* DLDataTypeCode; TVM's bool is NN_UINT of 1 bit */

typedef struct {
  nn_place place;
  size_t at; /* byte offset in the arena or the weights; the number of the input or output */
  uint8_t code, bits;
  int32_t ndim;
  const int64_t *shape;
} nn_tensor;

/* The last two members of an nn_tensor: {NN_ARENA, 0, NN_FLOAT, 32, NN_SHAPE(1, 3, 224, 224)}.
 * A scalar ends in 0, NULL. */
#define NN_SHAPE(...)                                            \
  (int32_t)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), \
      (const int64_t[]) { __VA_ARGS__ }

/* An input or output of the model. Kernels need 64-byte alignment: a caller's buffer that has it
 * is used as it is, any other goes through a copy at `staging`, an offset in the arena. */
typedef struct {
  size_t bytes;
  size_t element_bytes; /* the alignment that is asked of the caller */
  size_t staging;
} nn_port;

typedef struct {
  const char *features; /* of the CPU, as in /proc/cpuinfo, separated by spaces */
  const void *weights;  /* 64-byte aligned */
  size_t weights_bytes;
  uint32_t weights_crc; /* zlib's crc32 */
  size_t arena_bytes;
  size_t outer_bytes; /* peak of workspaces outside parallel regions, each rounded up to 64 */
  size_t inner_bytes; /* the same within one task of a parallel region */
  const nn_tensor *tensors;
  int tensor_count;
  const nn_port *inputs;
  int input_count;
  const nn_port *outputs;
  int output_count;
  int (*execute)(nn_instance *); /* all kernels in order, by NN_CALL; returns NN_OK */
} nn_model;

/* Call a kernel with tensors by their numbers; leaves `execute` with a code when it fails. */
#define NN_CALL(instance, kernel, ...)                                      \
  do {                                                                      \
    static const uint16_t nn_numbers[] = {__VA_ARGS__};                     \
    int nn_code = nn_call((instance), (kernel), nn_numbers,                 \
                          (int)(sizeof nn_numbers / sizeof nn_numbers[0])); \
    if (nn_code != NN_OK) return nn_code;                                   \
  } while (0)

int nn_call(nn_instance *instance, nn_kernel *kernel, const uint16_t *tensors, int count);

/* ---- What the generated functions call ---- */

/* Bytes of one instance; 0 for a bad number of threads, SIZE_MAX for more than can be had. */
size_t nn_memory_bytes(const nn_model *model, int threads);

/* An instance with `threads` threads, the caller's included (1: none is started), in memory of
 * its own or of the caller's: 64-byte aligned, nn_memory_bytes long, untouched until destroyed.
 * *out is NULL after a failure. */
int nn_create(nn_instance **out, const nn_model *model, int threads);
int nn_create_in(nn_instance **out, const nn_model *model, void *memory, size_t bytes, int threads);

/* One inference. Inputs may not overlap outputs, nor outputs each other. An instance runs for one
 * thread at a time: NN_BUSY for the second. A pointer that was destroyed is refused
 * (NN_NOT_AN_INSTANCE) until a new instance happens to have its address.
 * In a child after fork() an instance runs in the calling thread alone, with the same results; one
 * that was running in another thread at the time of the fork stays NN_BUSY there. */
int nn_run(nn_instance *instance, const void *const *inputs, void *const *outputs);

/* Stops the threads and gives the memory back. NULL is NN_OK; twice is NN_NOT_AN_INSTANCE;
 * during a run it is NN_BUSY and nothing happens. */
int nn_destroy(nn_instance *instance);

int nn_check_cpu(const char *features);
int nn_check_weights(const nn_model *model);
uint32_t nn_crc32(const void *data, size_t bytes);

/* NN_OK when |output - expected| <= tolerance for every element, or both are NaN or the same infinity;
 * NN_GOLDEN_MISMATCH otherwise. */
int nn_compare(const float *output, const float *expected, const float *tolerance, size_t count);

/* NN_OK, or NN_INPUT_NOT_FINITE when a value is NaN or infinite: kernels would make an ordinary
 * number of it. NULL is NN_NULL_POINTER. */
int nn_check_finite(const float *input, size_t count);

/* ---- What the kernels call ---- */

typedef struct {
  void *sync_handle;
  int32_t num_task;
} TVMParallelGroupEnv;

typedef int nn_task(int task_id, TVMParallelGroupEnv *env, void *cdata);

void *TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t nbytes,
                               int dtype_code_hint, int dtype_bits_hint);
int TVMBackendFreeWorkspace(int device_type, int device_id, void *ptr);
int TVMBackendParallelLaunch(nn_task *flambda, void *cdata, int num_task);
int TVMBackendParallelBarrier(int task_id, TVMParallelGroupEnv *env);
void TVMAPISetLastError(const char *message);

#endif
