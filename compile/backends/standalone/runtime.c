/* All functions of runtime.h. Longer than 450 lines: threads, workspaces and instances share structures and static
 * functions that no other part of a library may see. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* sched_getaffinity, sched_getcpu */
#endif
#include "runtime.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h>
#endif

/* How long a thread looks for work before it sleeps: longer than the gaps between the kernels of
 * one inference, shorter than anyone would notice. */
#define SPIN_NS 100000
/* Large memory begins at a huge page and asks for them, whole ones inside it only: the first
 * inference then takes a few page faults instead of thousands. Where there are none, nothing changes. */
#define HUGE_PAGE_BYTES ((size_t)2 << 20)
#define THREAD_STACK_BYTES ((size_t)512 << 10)

/* A number that threads wait for to change: by looking at it for a while, then asleep. */
typedef struct {
  _Alignas(NN_ALIGNMENT) uint32_t value;
  uint32_t sleepers;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
} gate;

/* A thread of an instance; the first is whoever calls nn_run. */
typedef struct {
  _Alignas(NN_ALIGNMENT) nn_instance *instance;
  int index;
  int in_task;
  uint32_t cleared; /* the last run in which this worker looked at which CPU it is on */
  unsigned char *stack; /* of workspaces */
  size_t stack_bytes, stack_top;
  pthread_t thread;
  _Alignas(NN_ALIGNMENT) uint32_t claimed; /* the last launch whose share of this lane is taken */
} lane;

struct nn_instance {
  const nn_model *model;
  void *owned; /* what nn_destroy frees, or NULL */
  nn_dltensor *tensors;
  unsigned char *arena;
  lane *lanes;
  int threads;
  int64_t spin_ns;
  pid_t process; /* that has the threads */
  int alone;     /* this run has the calling thread only */
  cpu_set_t cpus; /* that this process may use */
  int caller_cpu; /* that the run under way began on */
  uint32_t runs;  /* so far, the one under way included */

  nn_task *task; /* of the launch under way, as are the next three */
  void *cdata;
  TVMParallelGroupEnv env;
  int failed;
  int stop;
  gate launch; /* number of the latest launch */
  gate shares; /* how many of its shares are not done */
};

/* The lane of this thread while it runs kernels. */
static _Thread_local lane *current;

/* ---- Errors ---- */

const char *nn_error_text(int code) {
  switch ((nn_error)code) {
    case NN_OK: return "no error";
    case NN_NULL_POINTER: return "a pointer is NULL";
    case NN_MISALIGNED: return "a pointer is not aligned as its type needs (memory: 64 bytes)";
    case NN_OVERLAP: return "an output overlaps an input or another output";
    case NN_BUSY: return "the instance is in use by another thread";
    case NN_NO_MEMORY: return "the system gives no more memory or threads";
    case NN_MEMORY_TOO_SMALL: return "the memory is smaller than this number of threads needs";
    case NN_BAD_THREADS: return "the number of threads is not from 1 to 64";
    case NN_TOO_MANY_INSTANCES: return "256 instances exist already";
    case NN_NOT_AN_INSTANCE: return "the pointer is no instance of this model, or was destroyed";
    case NN_CPU_LACKS_FEATURES: return "this CPU lacks instructions that the code was built for";
    case NN_KERNEL_FAILED: return "a kernel failed: the library is damaged or wrongly built";
    case NN_WEIGHTS_DAMAGED: return "the weights' checksum is wrong: the library is damaged";
    case NN_GOLDEN_MISMATCH: return "the golden input does not give the golden output";
    case NN_INPUT_NOT_FINITE: return "the input has NaN or infinity";
  }
  return "unknown error code";
}

/* ---- Waiting ---- */

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void gate_open(gate *gate) {
  gate->value = 0;
  gate->sleepers = 0;
  pthread_mutex_init(&gate->mutex, NULL);
  pthread_cond_init(&gate->changed, NULL);
}

static void gate_close(gate *gate) {
  pthread_cond_destroy(&gate->changed);
  pthread_mutex_destroy(&gate->mutex);
}

/* To be called after a change of the value that sleepers wait for. Either this sees the sleeper or
 * the sleeper sees the change: both sides write, then read, sequentially consistent. */
static void gate_wake(gate *gate) {
  if (__atomic_load_n(&gate->sleepers, __ATOMIC_SEQ_CST) == 0) return;
  pthread_mutex_lock(&gate->mutex);
  pthread_cond_broadcast(&gate->changed);
  pthread_mutex_unlock(&gate->mutex);
}

/* Wait until the value is no longer `old`; the new one. */
static uint32_t gate_wait(gate *gate, uint32_t old, int64_t spin_ns) {
  uint32_t value;
  int64_t end = spin_ns ? now_ns() + spin_ns : 0;
  do {
    for (int i = 0; i < 64; i++) {
      value = __atomic_load_n(&gate->value, __ATOMIC_ACQUIRE);
      if (value != old) return value;
      relax();
    }
  } while (spin_ns && now_ns() < end);

  pthread_mutex_lock(&gate->mutex);
  __atomic_add_fetch(&gate->sleepers, 1, __ATOMIC_SEQ_CST);
  while ((value = __atomic_load_n(&gate->value, __ATOMIC_SEQ_CST)) == old)
    pthread_cond_wait(&gate->changed, &gate->mutex);
  __atomic_sub_fetch(&gate->sleepers, 1, __ATOMIC_SEQ_CST);
  pthread_mutex_unlock(&gate->mutex);
  return value;
}

/* ---- Parallel launches ---- */

static int run_tasks(lane *self, nn_task *task, void *cdata, TVMParallelGroupEnv *env, int first,
                     int step) {
  size_t top = self->stack_top;
  int was_in_task = self->in_task;
  int failed = 0;
  self->in_task = 1;
  for (int id = first; id < env->num_task && !failed; id += step) {
    failed = task(id, env, cdata) != 0;
    self->stack_top = top;
  }
  self->in_task = was_in_task;
  return failed;
}

/* Run what is left of a launch: the lane's own share first, then those whose threads have not come
 * yet. A share is taken by the step of `claimed` from the launch before to this one, so a thread
 * that wakes too late takes nothing and does not look at the task. */
static void take_shares(lane *self, uint32_t launch) {
  nn_instance *instance = self->instance;
  int threads = instance->threads;
  for (int i = 0; i < threads; i++) {
    lane *owner = &instance->lanes[(self->index + i) % threads];
    uint32_t before = launch - 1;
    if (__atomic_load_n(&owner->claimed, __ATOMIC_RELAXED) != before ||
        !__atomic_compare_exchange_n(&owner->claimed, &before, launch, 0, __ATOMIC_RELAXED,
                                     __ATOMIC_RELAXED))
      continue;
    if (run_tasks(self, instance->task, instance->cdata, &instance->env, owner->index, threads))
      __atomic_store_n(&instance->failed, 1, __ATOMIC_RELAXED);
    if (__atomic_sub_fetch(&instance->shares.value, 1, __ATOMIC_SEQ_CST) == 0)
      gate_wake(&instance->shares);
  }
}

/* Systems wake a thread on the CPU of whoever wakes it, where the caller's work and the worker's
 * would take turns while another CPU idles. Once a run, a worker that finds itself there leaves. */
static void leave_callers_cpu(lane *self) {
  nn_instance *instance = self->instance;
  uint32_t runs = __atomic_load_n(&instance->runs, __ATOMIC_RELAXED);
  if (self->cleared == runs) return;
  self->cleared = runs;
  int cpu = sched_getcpu();
  if (cpu < 0 || cpu != __atomic_load_n(&instance->caller_cpu, __ATOMIC_RELAXED)) return;
  cpu_set_t others = instance->cpus;
  CPU_CLR((size_t)cpu, &others);
  if (CPU_COUNT(&others)) (void)sched_setaffinity(0, sizeof others, &others);
}

static void *worker(void *argument) {
  lane *self = argument;
  nn_instance *instance = self->instance;
  uint32_t launch = 0;
  current = self;
  for (;;) {
    launch = gate_wait(&instance->launch, launch, instance->spin_ns);
    if (__atomic_load_n(&instance->stop, __ATOMIC_RELAXED)) return NULL;
    leave_callers_cpu(self);
    take_shares(self, launch);
  }
}

static uint32_t announce(nn_instance *instance) {
  uint32_t launch = __atomic_add_fetch(&instance->launch.value, 1, __ATOMIC_SEQ_CST);
  gate_wake(&instance->launch);
  return launch;
}

int TVMBackendParallelLaunch(nn_task *flambda, void *cdata, int num_task) {
  lane *self = current;
  if (!self || num_task < 0) return -1;
  nn_instance *instance = self->instance;
  int threads = self->in_task || instance->alone ? 1 : instance->threads;
  TVMParallelGroupEnv env = {NULL, num_task ? num_task : threads};
  if (threads == 1 || env.num_task == 1)
    return run_tasks(self, flambda, cdata, &env, 0, 1) ? -1 : 0;

  instance->task = flambda;
  instance->cdata = cdata;
  instance->env = env;
  __atomic_store_n(&instance->failed, 0, __ATOMIC_RELAXED);
  __atomic_store_n(&instance->shares.value, (uint32_t)threads, __ATOMIC_RELAXED);
  take_shares(self, announce(instance));
  uint32_t left = __atomic_load_n(&instance->shares.value, __ATOMIC_ACQUIRE);
  while (left) left = gate_wait(&instance->shares, left, instance->spin_ns);
  return __atomic_load_n(&instance->failed, __ATOMIC_RELAXED) ? -1 : 0;
}

/* No schedule of TVM asks for one unless told to; here tasks may run after each other. */
int TVMBackendParallelBarrier(int task_id, TVMParallelGroupEnv *env) {
  (void)task_id;
  return env->num_task == 1 ? 0 : -1;
}

static void stop_threads(nn_instance *instance, int started) {
  if (instance->threads > 1 && instance->process != getpid()) return; /* forked: there are none */
  __atomic_store_n(&instance->stop, 1, __ATOMIC_RELAXED);
  announce(instance);
  for (int i = 1; i < started; i++) pthread_join(instance->lanes[i].thread, NULL);
  gate_close(&instance->launch);
  gate_close(&instance->shares);
}

static int start_threads(nn_instance *instance) {
  int started = 1, failed = 0;
  pthread_attr_t attributes;
  sigset_t all, before;
  if (instance->threads == 1) return NN_OK;
  if (pthread_attr_init(&attributes)) return NN_NO_MEMORY;
  pthread_attr_setstacksize(&attributes, THREAD_STACK_BYTES);
  sigfillset(&all); /* the program's signals are for the program's threads */
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (started < instance->threads && !failed) {
    lane *self = &instance->lanes[started];
    failed = pthread_create(&self->thread, &attributes, worker, self) != 0;
    started += !failed;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  if (failed) stop_threads(instance, started);
  return failed ? NN_NO_MEMORY : NN_OK;
}

/* ---- Workspaces and errors of kernels ---- */

static uint64_t round_up(uint64_t bytes) {
  return (bytes + NN_ALIGNMENT - 1) / NN_ALIGNMENT * NN_ALIGNMENT;
}

void *TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t nbytes,
                               int dtype_code_hint, int dtype_bits_hint) {
  (void)device_type, (void)device_id, (void)dtype_code_hint, (void)dtype_bits_hint;
  lane *self = current;
  if (!self || nbytes > self->stack_bytes - self->stack_top) return NULL;
  void *workspace = self->stack + self->stack_top;
  self->stack_top += (size_t)round_up(nbytes); /* the stack's size is a multiple too */
  return workspace;
}

/* Kernels free in reverse order. */
int TVMBackendFreeWorkspace(int device_type, int device_id, void *ptr) {
  (void)device_type, (void)device_id;
  lane *self = current;
  if (!self || (uintptr_t)ptr < (uintptr_t)self->stack ||
      (uintptr_t)ptr >= (uintptr_t)self->stack + self->stack_top)
    return -1;
  self->stack_top = (size_t)((unsigned char *)ptr - self->stack);
  return 0;
}

void TVMAPISetLastError(const char *message) { (void)message; }

/* ---- Instances alive ---- */

/* Addresses of instances, in any order; the lowest bit is set while one is in use. A fixed table
 * and no lock: a pointer is looked up without reading through it, and a fork cannot catch the
 * table half written. */
static uintptr_t alive[NN_MAX_INSTANCES];
#define IN_USE ((uintptr_t)1)

static int acquire(const nn_instance *instance, uintptr_t **slot) {
  uintptr_t address = (uintptr_t)instance;
  if (!instance) return NN_NULL_POINTER;
  for (int i = 0; i < NN_MAX_INSTANCES; i++) {
    if ((__atomic_load_n(&alive[i], __ATOMIC_RELAXED) & ~IN_USE) != address) continue;
    *slot = &alive[i];
    uintptr_t idle = address;
    return __atomic_compare_exchange_n(&alive[i], &idle, address | IN_USE, 0, __ATOMIC_ACQUIRE,
                                       __ATOMIC_RELAXED)
               ? NN_OK
               : NN_BUSY;
  }
  return NN_NOT_AN_INSTANCE;
}

static void release(uintptr_t *slot, const nn_instance *instance) {
  __atomic_store_n(slot, (uintptr_t)instance, __ATOMIC_RELEASE);
}

/* A slot for a new instance, in use until it is released. */
static int reserve(const void *memory, uintptr_t **slot) {
  for (int i = 0; i < NN_MAX_INSTANCES; i++)
    if ((__atomic_load_n(&alive[i], __ATOMIC_RELAXED) & ~IN_USE) == (uintptr_t)memory)
      return NN_BUSY;
  for (int i = 0; i < NN_MAX_INSTANCES; i++) {
    uintptr_t none = 0;
    *slot = &alive[i];
    if (__atomic_compare_exchange_n(&alive[i], &none, (uintptr_t)memory | IN_USE, 0,
                                    __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
      return NN_OK;
  }
  return NN_TOO_MANY_INSTANCES;
}

/* ---- Creating and destroying ---- */

/* Offsets of an instance's parts. 64 bits: no sum overflows before it is compared. */
typedef struct {
  uint64_t tensors, lanes, stacks, arena, bytes;
} layout;

static layout lay_out(const nn_model *model, int threads) {
  layout at;
  at.tensors = round_up(sizeof(nn_instance));
  at.lanes = at.tensors + round_up((uint64_t)model->tensor_count * sizeof(nn_dltensor));
  at.stacks = at.lanes + (uint64_t)threads * sizeof(lane);
  at.arena = at.stacks + round_up(model->outer_bytes) +
             (uint64_t)threads * round_up(model->inner_bytes);
  at.bytes = at.arena + round_up(model->arena_bytes);
  return at;
}

static int bad_threads(int threads) { return threads < 1 || threads > NN_MAX_THREADS; }

size_t nn_memory_bytes(const nn_model *model, int threads) {
  if (bad_threads(threads)) return 0;
  uint64_t bytes = lay_out(model, threads).bytes;
  return bytes > SIZE_MAX ? SIZE_MAX : (size_t)bytes;
}

static void set_tensor(nn_dltensor *tensor, const nn_tensor *description) {
  memset(tensor, 0, sizeof *tensor);
  tensor->device.device_type = 1; /* kDLCPU */
  tensor->ndim = description->ndim;
  tensor->dtype.code = description->code;
  tensor->dtype.bits = description->bits;
  tensor->dtype.lanes = 1;
  tensor->shape = (int64_t *)(uintptr_t)description->shape;
}

/* How many CPUs this process may use, and which; many and none when the system does not say. */
static int usable_cpus(cpu_set_t *cpus) {
  if (!sched_getaffinity(0, sizeof *cpus, cpus)) return CPU_COUNT(cpus);
  CPU_ZERO(cpus);
  return NN_MAX_THREADS;
}

static void set_up(nn_instance *instance, const nn_model *model, int threads) {
  unsigned char *memory = (unsigned char *)instance;
  layout at = lay_out(model, threads);
  memset(instance, 0, sizeof *instance);
  instance->model = model;
  instance->tensors = (nn_dltensor *)(void *)(memory + at.tensors);
  instance->lanes = (lane *)(void *)(memory + at.lanes);
  instance->arena = memory + at.arena;
  instance->threads = threads;
  instance->process = getpid();
  /* Who waits in vain on a CPU keeps away the thread that he waits for. */
  instance->spin_ns = threads <= usable_cpus(&instance->cpus) ? SPIN_NS : 0;
  gate_open(&instance->launch);
  gate_open(&instance->shares);
  for (int i = 0; i < model->tensor_count; i++) {
    const nn_tensor *description = &model->tensors[i];
    set_tensor(&instance->tensors[i], description);
    if (description->place == NN_ARENA)
      instance->tensors[i].data = instance->arena + description->at;
    else if (description->place == NN_WEIGHTS)
      instance->tensors[i].data = (unsigned char *)(uintptr_t)model->weights + description->at;
  }
  unsigned char *stack = memory + at.stacks;
  for (int i = 0; i < threads; i++) {
    lane *self = &instance->lanes[i];
    memset(self, 0, sizeof *self);
    self->instance = instance;
    self->index = i;
    self->stack = stack;
    self->stack_bytes =
        (size_t)(round_up(model->inner_bytes) + (i ? 0 : round_up(model->outer_bytes)));
    stack += self->stack_bytes;
  }
}

/* `owned`: what nn_destroy frees, or NULL. */
static int create(nn_instance **out, const nn_model *model, void *memory, size_t bytes, int threads,
                  void *owned) {
  if (!memory) return NN_NULL_POINTER;
  if (bad_threads(threads)) return NN_BAD_THREADS;
  if ((uintptr_t)memory % NN_ALIGNMENT) return NN_MISALIGNED;
  if (bytes < lay_out(model, threads).bytes) return NN_MEMORY_TOO_SMALL;
  int code = nn_check_cpu(model->features);
  if (code != NN_OK) return code;
  uintptr_t *slot;
  code = reserve(memory, &slot);
  if (code != NN_OK) return code;
  nn_instance *instance = memory;
  set_up(instance, model, threads);
  instance->owned = owned;
  code = start_threads(instance);
  release(slot, code == NN_OK ? instance : NULL);
  if (code == NN_OK) *out = instance;
  return code;
}

int nn_create_in(nn_instance **out, const nn_model *model, void *memory, size_t bytes,
                 int threads) {
  if (!out) return NN_NULL_POINTER;
  *out = NULL;
  return create(out, model, memory, bytes, threads, NULL);
}

int nn_create(nn_instance **out, const nn_model *model, int threads) {
  if (!out) return NN_NULL_POINTER;
  *out = NULL;
  if (bad_threads(threads)) return NN_BAD_THREADS;
  size_t bytes = nn_memory_bytes(model, threads);
  size_t alignment = bytes < HUGE_PAGE_BYTES ? NN_ALIGNMENT : HUGE_PAGE_BYTES;
  void *memory;
  if (bytes == SIZE_MAX || posix_memalign(&memory, alignment, bytes)) return NN_NO_MEMORY;
  if (alignment == HUGE_PAGE_BYTES) (void)madvise(memory, bytes, MADV_HUGEPAGE);
  int code = create(out, model, memory, bytes, threads, memory);
  if (code != NN_OK) free(memory);
  return code;
}

int nn_destroy(nn_instance *instance) {
  uintptr_t *slot;
  if (!instance) return NN_OK;
  int code = acquire(instance, &slot);
  if (code != NN_OK) return code;
  stop_threads(instance, instance->threads);
  void *owned = instance->owned;
  release(slot, NULL);
  free(owned);
  return NN_OK;
}

/* ---- Running ---- */

int nn_call(nn_instance *instance, nn_kernel *kernel, const uint16_t *tensors, int count) {
  nn_value arguments[NN_MAX_ARGUMENTS];
  int32_t type_codes[NN_MAX_ARGUMENTS];
  nn_value result;
  int32_t result_type;
  if (count > NN_MAX_ARGUMENTS) return NN_KERNEL_FAILED;
  for (int i = 0; i < count; i++) {
    arguments[i].v_handle = &instance->tensors[tensors[i]];
    type_codes[i] = 7; /* kTVMDLTensorHandle */
  }
  return kernel(arguments, type_codes, count, &result, &result_type, NULL) ? NN_KERNEL_FAILED
                                                                           : NN_OK;
}

static int overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes) {
  return (uintptr_t)a < (uintptr_t)b + b_bytes && (uintptr_t)b < (uintptr_t)a + a_bytes;
}

static int check_buffers(const nn_model *model, const void *const *inputs, void *const *outputs) {
  if (!inputs || !outputs) return NN_NULL_POINTER;
  for (int i = 0; i < model->input_count; i++) {
    if (!inputs[i]) return NN_NULL_POINTER;
    if ((uintptr_t)inputs[i] % model->inputs[i].element_bytes) return NN_MISALIGNED;
  }
  for (int i = 0; i < model->output_count; i++) {
    const nn_port *port = &model->outputs[i];
    if (!outputs[i]) return NN_NULL_POINTER;
    if ((uintptr_t)outputs[i] % port->element_bytes) return NN_MISALIGNED;
    for (int j = 0; j < model->input_count; j++)
      if (overlap(outputs[i], port->bytes, inputs[j], model->inputs[j].bytes)) return NN_OVERLAP;
    for (int j = 0; j < i; j++)
      if (overlap(outputs[i], port->bytes, outputs[j], model->outputs[j].bytes)) return NN_OVERLAP;
  }
  return NN_OK;
}

/* Where the kernels find an input or output: the caller's buffer where it is aligned for them. */
static void *port_data(const nn_instance *instance, const nn_port *port, const void *buffer) {
  return (uintptr_t)buffer % NN_ALIGNMENT ? instance->arena + port->staging
                                          : (void *)(uintptr_t)buffer;
}

static int run(nn_instance *instance, const void *const *inputs, void *const *outputs) {
  const nn_model *model = instance->model;
  int code = check_buffers(model, inputs, outputs);
  if (code != NN_OK) return code;
  for (int i = 0; i < model->tensor_count; i++) {
    const nn_tensor *tensor = &model->tensors[i];
    if (tensor->place == NN_INPUT)
      instance->tensors[i].data =
          port_data(instance, &model->inputs[tensor->at], inputs[tensor->at]);
    else if (tensor->place == NN_OUTPUT)
      instance->tensors[i].data =
          port_data(instance, &model->outputs[tensor->at], outputs[tensor->at]);
  }
  for (int i = 0; i < model->input_count; i++) {
    void *data = port_data(instance, &model->inputs[i], inputs[i]);
    if (data != inputs[i]) memcpy(data, inputs[i], model->inputs[i].bytes);
  }

  lane *caller = &instance->lanes[0];
  lane *outside = current;
  caller->stack_top = 0;
  instance->alone = instance->threads == 1 || instance->process != getpid();
  if (!instance->alone) {
    __atomic_store_n(&instance->caller_cpu, sched_getcpu(), __ATOMIC_RELAXED);
    __atomic_store_n(&instance->runs, instance->runs + 1, __ATOMIC_RELAXED);
  }
  current = caller;
  code = model->execute(instance);
  current = outside;

  for (int i = 0; i < model->output_count && code == NN_OK; i++) {
    void *data = port_data(instance, &model->outputs[i], outputs[i]);
    if (data != outputs[i]) memcpy(outputs[i], data, model->outputs[i].bytes);
  }
  return code;
}

int nn_run(nn_instance *instance, const void *const *inputs, void *const *outputs) {
  uintptr_t *slot;
  int code = acquire(instance, &slot);
  if (code != NN_OK) return code;
  code = run(instance, inputs, outputs);
  release(slot, instance);
  return code;
}

/* ---- Checks ---- */

#if defined(__x86_64__)

/* Linux's names (arch/x86/include/asm/cpufeatures.h) and CPUID's bits (Intel SDM, volume 2A,
 * CPUID; AMD APM, volume 3, appendix E). `state`: what XCR0 must say that the system saves. */
enum { EAX, EBX, ECX, EDX };
enum { YMM = 0x06, ZMM = 0xe6 };
static const struct {
  uint32_t leaf, subleaf;
} cpu_leaves[] = {{1, 0}, {7, 0}, {7, 1}, {0x80000001, 0}};
enum { LEAF_1, LEAF_7_0, LEAF_7_1, LEAF_AMD, LEAVES };
static const struct {
  char name[20];
  uint8_t leaf, word, bit, state;
} cpu_features[] = {
    {"sse", LEAF_1, EDX, 25, 0},
    {"sse2", LEAF_1, EDX, 26, 0},
    {"pni", LEAF_1, ECX, 0, 0},
    {"ssse3", LEAF_1, ECX, 9, 0},
    {"fma", LEAF_1, ECX, 12, YMM},
    {"cx16", LEAF_1, ECX, 13, 0},
    {"sse4_1", LEAF_1, ECX, 19, 0},
    {"sse4_2", LEAF_1, ECX, 20, 0},
    {"movbe", LEAF_1, ECX, 22, 0},
    {"popcnt", LEAF_1, ECX, 23, 0},
    {"aes", LEAF_1, ECX, 25, 0},
    {"avx", LEAF_1, ECX, 28, YMM},
    {"f16c", LEAF_1, ECX, 29, YMM},
    {"bmi1", LEAF_7_0, EBX, 3, 0},
    {"avx2", LEAF_7_0, EBX, 5, YMM},
    {"bmi2", LEAF_7_0, EBX, 8, 0},
    {"avx512f", LEAF_7_0, EBX, 16, ZMM},
    {"avx512dq", LEAF_7_0, EBX, 17, ZMM},
    {"avx512ifma", LEAF_7_0, EBX, 21, ZMM},
    {"avx512cd", LEAF_7_0, EBX, 28, ZMM},
    {"avx512bw", LEAF_7_0, EBX, 30, ZMM},
    {"avx512vl", LEAF_7_0, EBX, 31, ZMM},
    {"avx512vbmi", LEAF_7_0, ECX, 1, ZMM},
    {"avx512_vbmi2", LEAF_7_0, ECX, 6, ZMM},
    {"gfni", LEAF_7_0, ECX, 8, 0},
    {"vaes", LEAF_7_0, ECX, 9, YMM},
    {"vpclmulqdq", LEAF_7_0, ECX, 10, YMM},
    {"avx512_vnni", LEAF_7_0, ECX, 11, ZMM},
    {"avx512_bitalg", LEAF_7_0, ECX, 12, ZMM},
    {"avx512_vpopcntdq", LEAF_7_0, ECX, 14, ZMM},
    {"avx512_fp16", LEAF_7_0, EDX, 23, ZMM},
    {"avx_vnni", LEAF_7_1, EAX, 4, YMM},
    {"avx512_bf16", LEAF_7_1, EAX, 5, ZMM},
    {"lahf_lm", LEAF_AMD, ECX, 0, 0},
    {"abm", LEAF_AMD, ECX, 5, 0},
};

/* What the CPU says, read once: under a hypervisor each CPUID is a trap of microseconds. */
typedef struct {
  uint32_t leaves[LEAVES][4];
  uint32_t states; /* register states that the system saves (XCR0); none without XSAVE */
} cpu_report;

static void read_cpu(cpu_report *cpu) {
  memset(cpu, 0, sizeof *cpu);
  for (int i = 0; i < LEAVES; i++) {
    uint32_t *word = cpu->leaves[i];
    __get_cpuid_count(cpu_leaves[i].leaf, cpu_leaves[i].subleaf, &word[EAX], &word[EBX],
                      &word[ECX], &word[EDX]);
  }
  if (cpu->leaves[LEAF_1][ECX] >> 27 & 1) { /* OSXSAVE */
    uint32_t high;
    __asm__ volatile("xgetbv" : "=a"(cpu->states), "=d"(high) : "c"(0));
  }
}

static int cpu_has(const cpu_report *cpu, size_t i) {
  uint32_t word = cpu->leaves[cpu_features[i].leaf][cpu_features[i].word];
  return (word >> cpu_features[i].bit & 1) &&
         (cpu->states & cpu_features[i].state) == cpu_features[i].state;
}

#elif defined(__aarch64__) || defined(__arm__)

/* Linux's names and bits: arch/arm64/include/uapi/asm/hwcap.h, arch/arm/include/uapi/asm/hwcap.h. */
static const struct {
  char name[12];
  uint8_t second, bit; /* of AT_HWCAP or, second, of AT_HWCAP2 */
} cpu_features[] = {
#if defined(__aarch64__)
    {"fp", 0, 0},        {"asimd", 0, 1},     {"aes", 0, 3},  {"crc32", 0, 7},
    {"atomics", 0, 8},   {"fphp", 0, 9},      {"asimdhp", 0, 10}, {"asimdrdm", 0, 12},
    {"lrcpc", 0, 15},    {"dcpop", 0, 16},    {"asimddp", 0, 20}, {"sve", 0, 22},
    {"asimdfhm", 0, 23}, {"ssbs", 0, 28},     {"sve2", 1, 1}, {"i8mm", 1, 13},
    {"bf16", 1, 14},
#else
    {"half", 0, 1},   {"thumb", 0, 2},  {"vfp", 0, 6},    {"edsp", 0, 7},   {"neon", 0, 12},
    {"vfpv3", 0, 13}, {"tls", 0, 15},   {"vfpv4", 0, 16}, {"idiva", 0, 17}, {"idivt", 0, 18},
    {"vfpd32", 0, 19},
#endif
};

typedef struct {
  unsigned long words[2];
} cpu_report;

static void read_cpu(cpu_report *cpu) {
  cpu->words[0] = getauxval(AT_HWCAP);
  cpu->words[1] = getauxval(AT_HWCAP2);
}

static int cpu_has(const cpu_report *cpu, size_t i) {
  return (int)(cpu->words[cpu_features[i].second] >> cpu_features[i].bit & 1);
}

#else
#error "no CPU check for this architecture"
#endif

int nn_check_cpu(const char *features) {
  cpu_report cpu;
  read_cpu(&cpu);
  while (*features) {
    size_t length = strcspn(features, " "), i = 0;
    size_t known = sizeof cpu_features / sizeof cpu_features[0];
    while (i < known && (strlen(cpu_features[i].name) != length ||
                         memcmp(cpu_features[i].name, features, length) != 0))
      i++;
    if (i == known || !cpu_has(&cpu, i)) return NN_CPU_LACKS_FEATURES;
    features += length + strspn(features + length, " ");
  }
  return NN_OK;
}

/* Eight bytes a step, by tables of each byte's effect at its distance from the end. */
uint32_t nn_crc32(const void *data, size_t bytes) {
  uint32_t table[8][256];
  for (uint32_t byte = 0; byte < 256; byte++) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    table[0][byte] = crc;
  }
  for (int distance = 1; distance < 8; distance++)
    for (int byte = 0; byte < 256; byte++) {
      uint32_t nearer = table[distance - 1][byte];
      table[distance][byte] = nearer >> 8 ^ table[0][nearer & 255];
    }

  const unsigned char *next = data;
  uint32_t crc = UINT32_MAX;
  for (; bytes >= 8; bytes -= 8, next += 8) {
    uint32_t low = crc ^ ((uint32_t)next[0] | (uint32_t)next[1] << 8 | (uint32_t)next[2] << 16 |
                          (uint32_t)next[3] << 24);
    crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^
          table[4][low >> 24] ^ table[3][next[4]] ^ table[2][next[5]] ^ table[1][next[6]] ^
          table[0][next[7]];
  }
  for (; bytes > 0; bytes--) crc = crc >> 8 ^ table[0][(crc ^ *next++) & 255];
  return ~crc;
}

int nn_check_weights(const nn_model *model) {
  return nn_crc32(model->weights, model->weights_bytes) == model->weights_crc ? NN_OK
                                                                              : NN_WEIGHTS_DAMAGED;
}

int nn_compare(const float *output, const float *expected, const float *tolerance, size_t count) {
  for (size_t i = 0; i < count; i++) {
    double difference = (double)output[i] - (double)expected[i];
    if (output[i] == expected[i] || (output[i] != output[i] && expected[i] != expected[i])) continue;
    if (!(difference <= tolerance[i] && -difference <= tolerance[i])) return NN_GOLDEN_MISMATCH;
  }
  return NN_OK;
}

int nn_check_finite(const float *input, size_t count) {
  uint32_t carries = 0; /* into the sign bit: of an exponent of ones only; no branch, so that it becomes SIMD */
  if (!input) return NN_NULL_POINTER;
  for (size_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, input + i, sizeof bits);
    carries |= (bits & 0x7fffffffu) + 0x00800000u;
  }
  return carries >> 31 ? NN_INPUT_NOT_FINITE : NN_OK;
}
