/* The runtime of a standalone model under made-up kernels: `runtime_check NAME` runs one check and
 * exits with 0, or prints the line that failed; without NAME it lists the checks.
 * Longer than 450 lines: all checks use the same made-up kernels and are one program, compiled once for each target. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "runtime.h"

#include <dirent.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      _exit(1);                                                             \
    }                                                                       \
  } while (0)

#define SIZE 1000
#define BYTES (SIZE * sizeof(float))
#define ROUNDED 4032 /* BYTES up to a multiple of 64 */

static pthread_t caller; /* of the run under way, where there is only one */

static void *workspace(uint64_t bytes) { return TVMBackendAllocWorkspace(1, 0, bytes, 2, 32); }
static int give_back(void *workspace) { return TVMBackendFreeWorkspace(1, 0, workspace); }
static int aligned(const void *pointer) { return (uintptr_t)pointer % 64 == 0; }

static float *data_of(void *arguments, int number) {
  nn_dltensor *tensor = ((nn_value *)arguments)[number].v_handle;
  CHECK(aligned(tensor->data) && tensor->strides == NULL && tensor->byte_offset == 0);
  CHECK(tensor->ndim == 2 && tensor->shape[0] == 1 && tensor->shape[1] == SIZE);
  CHECK(tensor->dtype.code == NN_FLOAT && tensor->dtype.bits == 32 && tensor->dtype.lanes == 1);
  CHECK(tensor->device.device_type == 1 && tensor->device.device_id == 0);
  return tensor->data;
}

#define KERNEL(name)                                                                       \
  static int32_t name(void *arguments, int32_t *type_codes, int32_t count, void *out_value, \
                      int32_t *out_type_code, void *resource)
#define UNUSED ((void)arguments, (void)type_codes, (void)count, (void)out_value, \
                (void)out_type_code, (void)resource)

typedef struct {
  const float *from, *by;
  float *to;
} vectors;

/* to = from * by, a share of the elements each, through two workspaces one within the other. */
static int scale_task(int task, TVMParallelGroupEnv *env, void *closure) {
  vectors *v = closure;
  int share = (SIZE + env->num_task - 1) / env->num_task;
  float *first = workspace(100 * sizeof(float)), *second = workspace(4);
  if (!first || !second) return -1;
  CHECK(aligned(first) && aligned(second) && second >= first + 100);
  for (int i = task * share; i < (task + 1) * share && i < SIZE; i++) {
    first[i % 100] = v->from[i];
    *second = v->by[i];
    v->to[i] = first[i % 100] * *second;
  }
  CHECK(give_back(second) == 0 && give_back(first) == 0);
  return 0;
}

KERNEL(scale) {
  UNUSED;
  CHECK(count == 3 && type_codes[0] == 7 && type_codes[2] == 7);
  vectors v = {NULL, data_of(arguments, 1), data_of(arguments, 2)};
  float *copy = workspace(BYTES);
  if (!copy) return -1;
  CHECK(aligned(copy));
  memcpy(copy, data_of(arguments, 0), BYTES);
  v.from = copy;
  int code = TVMBackendParallelLaunch(scale_task, &v, 0);
  return give_back(copy) || code ? -1 : 0;
}

static int add_one(int task, TVMParallelGroupEnv *env, void *closure) {
  vectors *v = closure;
  int share = (SIZE / 7 + 1 + env->num_task - 1) / env->num_task;
  float *one = workspace(4);
  if (!one) return -1;
  *one = 1;
  for (int i = task * share; i < (task + 1) * share && v->from + i < v->by; i++)
    v->to[i] = v->from[i] + *one;
  return give_back(one);
}

/* Each of seven tasks launches once more. */
static int add_one_task(int task, TVMParallelGroupEnv *env, void *closure) {
  vectors *v = closure;
  CHECK(env->num_task == 7);
  int share = SIZE / 7 + 1, start = task * share;
  int end = start + share < SIZE ? start + share : SIZE;
  vectors part = {v->from + start, v->from + end, v->to + start};
  return TVMBackendParallelLaunch(add_one, &part, 0);
}

KERNEL(increment) {
  UNUSED;
  vectors v = {data_of(arguments, 0), NULL, data_of(arguments, 1)};
  return TVMBackendParallelLaunch(add_one_task, &v, 7);
}

/* input x weights in the arena, plus one in the output. */
enum { INPUT, OUTPUT, HIDDEN, WEIGHTS };
static _Alignas(64) float weights[SIZE];

static int execute(nn_instance *self) {
  NN_CALL(self, scale, INPUT, WEIGHTS, HIDDEN);
  NN_CALL(self, increment, HIDDEN, OUTPUT);
  return NN_OK;
}

static const nn_tensor tensors[] = {
    {NN_INPUT, 0, NN_FLOAT, 32, NN_SHAPE(1, SIZE)},
    {NN_OUTPUT, 0, NN_FLOAT, 32, NN_SHAPE(1, SIZE)},
    {NN_ARENA, 0, NN_FLOAT, 32, NN_SHAPE(1, SIZE)},
    {NN_WEIGHTS, 0, NN_FLOAT, 32, NN_SHAPE(1, SIZE)},
};
static const nn_port input_port = {BYTES, sizeof(float), ROUNDED};
static const nn_port output_port = {BYTES, sizeof(float), 2 * ROUNDED};

/* A model as the emitter writes it; scale_task needs 448 + 64 bytes of workspace. */
static nn_model model_of(int (*calls)(nn_instance *)) {
  nn_model model = {"", weights, BYTES,   0, 3 * ROUNDED, ROUNDED,      512,
                    tensors, 4,  &input_port, 1, &output_port, 1, calls};
  return model;
}

/* Inputs that differ by instance, and what must come out. */
typedef struct {
  _Alignas(64) float input[SIZE];
  _Alignas(64) float output[SIZE];
  float offset;
} buffers;

static void fill(buffers *b, float offset) {
  b->offset = offset;
  for (int i = 0; i < SIZE; i++) b->input[i] = (float)i + offset;
}

static int run_on(nn_instance *instance, const float *input, float *output) {
  const void *const inputs[] = {input};
  void *const outputs[] = {output};
  return nn_run(instance, inputs, outputs);
}

static int right(const float *output, float offset) {
  for (int i = 0; i < SIZE; i++)
    if (output[i] != ((float)i + offset) * (float)(i % 3) + 1) return 0;
  return 1;
}

static int gives_right(nn_instance *instance, buffers *b) {
  memset(b->output, 0, BYTES);
  return run_on(instance, b->input, b->output) == NN_OK && right(b->output, b->offset);
}

static nn_instance *created(const nn_model *model, int threads) {
  nn_instance *instance;
  int code = nn_create(&instance, model, threads);
  if (code != NN_OK) fprintf(stderr, "create with %d threads: %s\n", threads, nn_error_text(code));
  CHECK(code == NN_OK && instance);
  return instance;
}

static buffers b; /* of the checks with one instance */

/* ---- Results ---- */

static void results(void) {
  nn_model model = model_of(execute);
  int threads[] = {1, 2, 3, 4, 8, 64};
  for (size_t t = 0; t < sizeof threads / sizeof threads[0]; t++) {
    nn_instance *instance = created(&model, threads[t]);
    for (int i = 0; i < 30; i++) {
      fill(&b, (float)i);
      CHECK(gives_right(instance, &b));
    }
    CHECK(nn_destroy(instance) == NN_OK);
  }
}

/* Every task once, for any number of tasks. */
static int asked_tasks, seen[101];
static int count_task(int task, TVMParallelGroupEnv *env, void *closure) {
  CHECK(env->num_task == *(int *)closure && task >= 0 && task < env->num_task);
  __atomic_add_fetch(&seen[task], 1, __ATOMIC_RELAXED);
  return TVMBackendParallelBarrier(task, env) == (env->num_task == 1 ? 0 : -1) ? 0 : -1;
}
static int task_threads;
KERNEL(count_tasks) {
  UNUSED;
  int expected = asked_tasks ? asked_tasks : task_threads;
  memset(seen, 0, sizeof seen);
  if (TVMBackendParallelLaunch(count_task, &expected, asked_tasks)) return -1;
  for (int i = 0; i <= 100; i++) CHECK(seen[i] == (i < expected));
  return 0;
}
static int execute_count(nn_instance *self) {
  NN_CALL(self, count_tasks, INPUT);
  return NN_OK;
}

static void tasks(void) {
  nn_model model = model_of(execute_count);
  for (task_threads = 1; task_threads <= 5; task_threads++) {
    nn_instance *instance = created(&model, task_threads);
    for (asked_tasks = 0; asked_tasks <= 100; asked_tasks++)
      CHECK(run_on(instance, b.input, b.output) == NN_OK);
    asked_tasks = -1;
    CHECK(run_on(instance, b.input, b.output) == NN_KERNEL_FAILED);
    CHECK(nn_destroy(instance) == NN_OK);
  }
}

/* Threads that went to sleep are woken, and late ones find their share done. */
static void pauses(void) {
  nn_model model = model_of(execute);
  nn_instance *instance = created(&model, 4);
  fill(&b, 5);
  for (int i = 0; i < 300; i++) {
    CHECK(gives_right(instance, &b));
    usleep((useconds_t)(i % 30 * 20));
  }
  CHECK(nn_destroy(instance) == NN_OK);
}

static void one_cpu(void) {
  cpu_set_t all, first;
  CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
  CPU_ZERO(&first);
  for (size_t cpu = 0; CPU_COUNT(&first) == 0; cpu++)
    if (CPU_ISSET(cpu, &all)) CPU_SET(cpu, &first);
  CHECK(sched_setaffinity(0, sizeof first, &first) == 0);
  nn_model model = model_of(execute);
  nn_instance *instance = created(&model, 4);
  fill(&b, 3);
  for (int i = 0; i < 100; i++) CHECK(gives_right(instance, &b));
  CHECK(nn_destroy(instance) == NN_OK);
}

/* Buffers aligned to 64 bytes are used in place, others are copied. */
static const void *seen_input, *seen_output;
KERNEL(look) {
  UNUSED;
  seen_input = data_of(arguments, 0);
  seen_output = data_of(arguments, 1);
  return 0;
}
static int execute_look(nn_instance *self) {
  NN_CALL(self, look, INPUT, OUTPUT);
  return execute(self);
}

static void alignment(void) {
  nn_model model = model_of(execute_look);
  nn_instance *instance = created(&model, 2);
  fill(&b, 7);
  CHECK(gives_right(instance, &b) && seen_input == b.input && seen_output == b.output);
  static _Alignas(64) float input[SIZE + 16], output[SIZE + 16];
  for (int shift = 1; shift < 16; shift++) {
    memcpy(input + shift, b.input, BYTES);
    output[SIZE + shift] = -1;
    CHECK(run_on(instance, input + shift, output + shift) == NN_OK);
    CHECK(right(output + shift, 7) && (shift == 15 || output[SIZE + shift] == -1));
    CHECK(seen_input != input + shift && seen_output != output + shift);
  }
  CHECK(nn_destroy(instance) == NN_OK);
}

/* ---- Several threads of the caller's ---- */

static void *run_often(void *argument) {
  nn_model model = model_of(execute);
  buffers *own = aligned_alloc(64, (sizeof *own + 63) / 64 * 64);
  CHECK(own);
  fill(own, *(float *)argument);
  nn_instance *instance = created(&model, 2);
  for (int i = 0; i < 200; i++) CHECK(gives_right(instance, own));
  CHECK(nn_destroy(instance) == NN_OK);
  free(own);
  return NULL;
}

static void two_instances(void) {
  float offsets[] = {3, 11};
  pthread_t threads[2];
  for (int i = 0; i < 2; i++) CHECK(!pthread_create(&threads[i], NULL, run_often, &offsets[i]));
  for (int i = 0; i < 2; i++) CHECK(!pthread_join(threads[i], NULL));
}

/* A run that stays within a task until it is let go. */
static int held, let_go;
static int hold_task(int task, TVMParallelGroupEnv *env, void *closure) {
  (void)env, (void)closure;
  if (task != 0) return 0;
  __atomic_store_n(&held, 1, __ATOMIC_RELEASE);
  while (!__atomic_load_n(&let_go, __ATOMIC_ACQUIRE)) sched_yield();
  return 0;
}
KERNEL(hold) {
  UNUSED;
  return TVMBackendParallelLaunch(hold_task, NULL, 0);
}
static int execute_held(nn_instance *self) {
  NN_CALL(self, hold, INPUT);
  return execute(self);
}
static void *run_held(void *instance) {
  CHECK(gives_right(instance, &b));
  return NULL;
}
static pthread_t start_held(nn_instance *instance) {
  pthread_t thread;
  fill(&b, 2);
  held = let_go = 0;
  CHECK(!pthread_create(&thread, NULL, run_held, instance));
  while (!__atomic_load_n(&held, __ATOMIC_ACQUIRE)) sched_yield();
  return thread;
}
static void end_held(pthread_t thread) {
  __atomic_store_n(&let_go, 1, __ATOMIC_RELEASE);
  CHECK(!pthread_join(thread, NULL));
}

static void busy(void) {
  static buffers other;
  nn_model model = model_of(execute_held);
  size_t bytes = nn_memory_bytes(&model, 3);
  void *memory = aligned_alloc(64, bytes);
  nn_instance *instance, *second;
  fill(&other, 4);
  CHECK(memory && nn_create_in(&instance, &model, memory, bytes, 3) == NN_OK);
  pthread_t thread = start_held(instance);
  CHECK(run_on(instance, other.input, other.output) == NN_BUSY);
  CHECK(nn_destroy(instance) == NN_BUSY);
  CHECK(nn_create_in(&second, &model, memory, bytes, 3) == NN_BUSY && !second);
  end_held(thread);
  CHECK(nn_create_in(&second, &model, memory, bytes, 3) == NN_BUSY && !second);
  CHECK(gives_right(instance, &other));
  CHECK(nn_destroy(instance) == NN_OK);
  free(memory);
}

/* Two threads that both go on until they are let in: one at a time, and each sees memory as the
 * other left it. */
static void *run_until_let_in(void *instance) {
  buffers *own = aligned_alloc(64, (sizeof *own + 63) / 64 * 64);
  CHECK(own);
  fill(own, 3);
  for (int done = 0; done < 100;) {
    int code = run_on(instance, own->input, own->output);
    CHECK(code == NN_OK || code == NN_BUSY);
    if (code == NN_BUSY) sched_yield();
    if (code == NN_OK) CHECK(right(own->output, 3) && ++done);
  }
  free(own);
  return NULL;
}
static void contended(void) {
  nn_model model = model_of(execute);
  nn_instance *instance = created(&model, 2);
  pthread_t threads[2];
  for (int i = 0; i < 2; i++) CHECK(!pthread_create(&threads[i], NULL, run_until_let_in, instance));
  for (int i = 0; i < 2; i++) CHECK(!pthread_join(threads[i], NULL));
  CHECK(nn_destroy(instance) == NN_OK);
}

/* An instance made in one thread runs and ends in others. */
static void *run_once(void *instance) {
  CHECK(gives_right(instance, &b));
  return NULL;
}
static void *destroy_once(void *instance) {
  CHECK(nn_destroy(instance) == NN_OK);
  return NULL;
}
static void handed_over(void) {
  nn_model model = model_of(execute);
  nn_instance *instance = created(&model, 3);
  pthread_t thread;
  fill(&b, 1);
  for (int i = 0; i < 20; i++) {
    CHECK(gives_right(instance, &b));
    CHECK(!pthread_create(&thread, NULL, i < 19 ? run_once : destroy_once, instance));
    CHECK(!pthread_join(thread, NULL));
  }
  CHECK(run_on(instance, b.input, b.output) == NN_NOT_AN_INSTANCE);
}

static void await_child(pid_t child) {
  int status;
  CHECK(child > 0 && waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* Tasks that wait for each other: a thread each. With all threads begun, none of them holds a lock
 * of libc or of a sanitizer at the fork. */
static int met, meeting;
static int meet_task(int task, TVMParallelGroupEnv *env, void *closure) {
  (void)task, (void)closure;
  __atomic_add_fetch(&met, 1, __ATOMIC_RELAXED);
  while (__atomic_load_n(&met, __ATOMIC_RELAXED) < env->num_task) sched_yield();
  return 0;
}
KERNEL(meet) {
  UNUSED;
  met = 0;
  return TVMBackendParallelLaunch(meet_task, NULL, 0);
}
static int execute_forked(nn_instance *self) {
  if (meeting) NN_CALL(self, meet, INPUT);
  NN_CALL(self, count_tasks, INPUT);
  return execute(self);
}

static void forked(void) {
  nn_model model = model_of(execute_forked);
  fill(&b, 6);
  for (int threads = 1; threads <= 4; threads++) {
    nn_instance *instance = created(&model, threads);
    task_threads = threads;
    meeting = 1;
    CHECK(gives_right(instance, &b));
    meeting = 0;
    pid_t child = fork();
    if (child == 0) {
      alarm(60);
      task_threads = 1; /* the calling thread alone */
      for (int i = 0; i < 20; i++) CHECK(gives_right(instance, &b));
#if !defined(__SANITIZE_THREAD__) /* which allows no threads in a child */
      task_threads = threads;
      nn_instance *own = created(&model, threads);
      CHECK(gives_right(own, &b) && nn_destroy(own) == NN_OK);
#endif
      CHECK(nn_destroy(instance) == NN_OK && nn_destroy(instance) == NN_NOT_AN_INSTANCE);
      _exit(0);
    }
    CHECK(gives_right(instance, &b));
    await_child(child);
    CHECK(gives_right(instance, &b) && nn_destroy(instance) == NN_OK);
  }
}

static void forked_while_running(void) {
  nn_model model = model_of(execute_held);
  nn_instance *instance = created(&model, 2);
  pthread_t thread = start_held(instance);
  static buffers other;
  pid_t child = fork();
  if (child == 0) {
    alarm(60);
    CHECK(run_on(instance, other.input, other.output) == NN_BUSY);
    CHECK(nn_destroy(instance) == NN_BUSY);
    _exit(0);
  }
  await_child(child);
  end_held(thread);
  CHECK(nn_destroy(instance) == NN_OK);
}

/* The program's signal handlers run in the program's own threads. */
static int signal_task(int task, TVMParallelGroupEnv *env, void *closure) {
  (void)task, (void)env;
  sigset_t blocked;
  CHECK(pthread_sigmask(SIG_BLOCK, NULL, &blocked) == 0);
  int is_caller = pthread_equal(pthread_self(), caller) != 0;
  CHECK(sigismember(&blocked, SIGTERM) == !is_caller);
  __atomic_add_fetch((int *)closure + is_caller, 1, __ATOMIC_RELAXED);
  usleep(1000); /* time for the others to come */
  return 0;
}
static int taken_by[2];
KERNEL(look_at_signals) {
  UNUSED;
  return TVMBackendParallelLaunch(signal_task, taken_by, 40);
}
static int execute_signals(nn_instance *self) {
  NN_CALL(self, look_at_signals, INPUT);
  return NN_OK;
}
static void signals(void) {
  nn_model model = model_of(execute_signals);
  nn_instance *instance = created(&model, 4);
  caller = pthread_self();
  for (int i = 0; i < 200 && !taken_by[0]; i++)
    CHECK(run_on(instance, b.input, b.output) == NN_OK);
  CHECK(taken_by[0] > 0 && taken_by[1] > 0);
  CHECK(nn_destroy(instance) == NN_OK);
}

/* ---- Wrong use ---- */

static void destroyed(void) {
  nn_model model = model_of(execute);
  fill(&b, 1);
  CHECK(nn_destroy(NULL) == NN_OK);
  CHECK(run_on(NULL, b.input, b.output) == NN_NULL_POINTER);
  for (int threads = 1; threads <= 2; threads++) {
    nn_instance *instance = created(&model, threads);
    CHECK(gives_right(instance, &b));
    CHECK(nn_destroy(instance) == NN_OK);
    CHECK(nn_destroy(instance) == NN_NOT_AN_INSTANCE);
    CHECK(run_on(instance, b.input, b.output) == NN_NOT_AN_INSTANCE);
  }
  nn_instance *instance = created(&model, 1);
  uintptr_t garbage[] = {1, 8, UINTPTR_MAX, (uintptr_t)&b, (uintptr_t)instance + 1,
                         (uintptr_t)instance + 64};
  for (size_t i = 0; i < sizeof garbage / sizeof garbage[0]; i++) {
    CHECK(run_on((nn_instance *)garbage[i], b.input, b.output) == NN_NOT_AN_INSTANCE);
    CHECK(nn_destroy((nn_instance *)garbage[i]) == NN_NOT_AN_INSTANCE);
  }
  CHECK(gives_right(instance, &b) && nn_destroy(instance) == NN_OK);
}

static int run_bytes(nn_instance *instance, char *input, char *output) {
  const void *const inputs[] = {input};
  void *const outputs[] = {output};
  return nn_run(instance, inputs, outputs);
}

static void bad_buffers(void) {
  nn_model model = model_of(execute);
  nn_instance *instance = created(&model, 2);
  static _Alignas(64) char memory[3 * BYTES];
  char *second = memory + BYTES;
  CHECK(nn_run(instance, NULL, NULL) == NN_NULL_POINTER);
  CHECK(run_bytes(instance, NULL, memory) == NN_NULL_POINTER);
  CHECK(run_bytes(instance, memory, NULL) == NN_NULL_POINTER);
  for (int shift = 1; shift < 4; shift++) {
    CHECK(run_bytes(instance, memory + shift, second + 64) == NN_MISALIGNED);
    CHECK(run_bytes(instance, memory, second + 64 + shift) == NN_MISALIGNED);
  }
  CHECK(run_bytes(instance, memory, memory) == NN_OVERLAP);
  CHECK(run_bytes(instance, memory, second - 4) == NN_OVERLAP);
  CHECK(run_bytes(instance, second - 4, memory) == NN_OVERLAP);
  CHECK(run_bytes(instance, memory, second) == NN_OK);
  CHECK(run_bytes(instance, second, memory) == NN_OK);

  nn_port ports[] = {output_port, output_port};
  nn_model two = model;
  two.outputs = ports;
  two.output_count = 2;
  nn_instance *with_two = created(&two, 1);
  const void *const inputs[] = {memory};
  CHECK(nn_run(with_two, inputs, (void *const[]){second, second + 4}) == NN_OVERLAP);
  CHECK(nn_run(with_two, inputs, (void *const[]){second, second + BYTES}) == NN_OK);
  CHECK(nn_destroy(with_two) == NN_OK && nn_destroy(instance) == NN_OK);
}

static void bad_threads(void) {
  nn_model model = model_of(execute);
  int numbers[] = {0, -1, 65, 1000, INT32_MAX, INT32_MIN};
  static _Alignas(64) char memory[64];
  for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
    nn_instance *instance = (nn_instance *)memory;
    CHECK(nn_memory_bytes(&model, numbers[i]) == 0);
    CHECK(nn_create(&instance, &model, numbers[i]) == NN_BAD_THREADS && !instance);
    instance = (nn_instance *)memory;
    CHECK(nn_create_in(&instance, &model, memory, 64, numbers[i]) == NN_BAD_THREADS && !instance);
  }
}

/* In the caller's memory and not a byte beyond it, which may be given to a new instance at once. */
static void caller_memory(void) {
  nn_model model = model_of(execute);
  for (int threads = 1; threads <= 4; threads++) {
    size_t bytes = nn_memory_bytes(&model, threads);
    unsigned char *memory = aligned_alloc(64, bytes + 128);
    nn_instance *instance = (nn_instance *)memory;
    CHECK(memory && bytes % 64 == 0);
    memset(memory, 0xa5, bytes + 128);
    CHECK(nn_create_in(NULL, &model, memory + 64, bytes, threads) == NN_NULL_POINTER);
    CHECK(nn_create_in(&instance, &model, NULL, bytes, threads) == NN_NULL_POINTER && !instance);
    CHECK(nn_create_in(&instance, &model, memory + 64, bytes - 1, threads) == NN_MEMORY_TOO_SMALL);
    for (int shift = 1; shift < 64; shift++)
      CHECK(nn_create_in(&instance, &model, memory + shift, bytes, threads) == NN_MISALIGNED);
    for (size_t i = 0; i < bytes + 128; i++) CHECK(memory[i] == 0xa5);
    for (int i = 0; i < 10; i++) {
      CHECK(nn_create_in(&instance, &model, memory + 64, bytes, threads) == NN_OK);
      CHECK((unsigned char *)instance == memory + 64);
      fill(&b, (float)i);
      CHECK(gives_right(instance, &b));
      CHECK(nn_destroy(instance) == NN_OK);
    }
    for (size_t i = 0; i < 64; i++) CHECK(memory[i] == 0xa5 && memory[64 + bytes + i] == 0xa5);
    free(memory);
  }
}

static void too_many(void) {
  static nn_instance *instances[NN_MAX_INSTANCES];
  nn_instance *another;
  nn_model model = model_of(execute);
  fill(&b, 1);
  for (int i = 0; i < NN_MAX_INSTANCES; i++) instances[i] = created(&model, 1);
  CHECK(nn_create(&another, &model, 1) == NN_TOO_MANY_INSTANCES && !another);
  CHECK(nn_destroy(instances[17]) == NN_OK);
  instances[17] = created(&model, 1);
  for (int i = 0; i < NN_MAX_INSTANCES; i++)
    CHECK(gives_right(instances[i], &b) && nn_destroy(instances[i]) == NN_OK);
}

/* ---- Kernels that fail ---- */

static void workspaces(void) {
  fill(&b, 1);
  for (int threads = 1; threads <= 4; threads++)
    for (int part = 0; part < 3; part++) {
      nn_model model = model_of(execute);
      /* With nothing for the outside the caller's copy must not fit into the inner ones. */
      if (part == 1) model.outer_bytes = 0;
      if (part == 2) model.inner_bytes = 448;
      nn_instance *instance = created(&model, threads);
      int expected = part ? NN_KERNEL_FAILED : NN_OK;
      for (int i = 0; i < 3; i++) CHECK(run_on(instance, b.input, b.output) == expected);
      CHECK(nn_destroy(instance) == NN_OK);
    }
  CHECK(workspace(4) == NULL && give_back(b.input) == -1);
  CHECK(TVMBackendParallelLaunch(count_task, NULL, 1) == -1);
}

KERNEL(grow) {
  UNUSED;
  char *first = workspace(1), *second = workspace(0), *rest;
  CHECK(first && second == first + 64);
  CHECK(workspace(UINT64_MAX) == NULL && workspace(UINT64_MAX - 63) == NULL);
  CHECK(workspace(ROUNDED + 512 - 63) == NULL);
  rest = workspace(ROUNDED + 512 - 64);
  CHECK(rest == second && workspace(1) == NULL);
  CHECK(give_back(first - 64) == -1 && give_back(b.input) == -1 && give_back(NULL) == -1);
  CHECK(give_back(rest) == 0 && give_back(first) == 0 && give_back(first) == -1);
  return 0;
}
static int execute_grow(nn_instance *self) {
  NN_CALL(self, grow, INPUT);
  return NN_OK;
}
static void workspace_limits(void) {
  nn_model model = model_of(execute_grow);
  nn_instance *instance = created(&model, 2);
  CHECK(run_on(instance, b.input, b.output) == NN_OK);
  CHECK(nn_destroy(instance) == NN_OK);
}

/* A task's failure is the kernel's, whichever thread it was in; the next run is right again. */
static int bad_task = -1;
static int fail_task(int task, TVMParallelGroupEnv *env, void *closure) {
  (void)env, (void)closure;
  usleep(200); /* time for the others to come */
  return task == bad_task && workspace(448) ? -1 : 0; /* never freed, as where a kernel fails */
}
KERNEL(fail) {
  UNUSED;
  if (!workspace(BYTES)) return -1;
  return TVMBackendParallelLaunch(fail_task, NULL, 9);
}
static int execute_failing(nn_instance *self) {
  if (bad_task >= 0) NN_CALL(self, fail, INPUT);
  return execute(self);
}
static void failures(void) {
  nn_model model = model_of(execute_failing);
  fill(&b, 9);
  for (int threads = 1; threads <= 4; threads++) {
    nn_instance *instance = created(&model, threads);
    for (int task = 0; task < 9; task++) {
      bad_task = task;
      memset(b.output, 0, BYTES);
      CHECK(run_on(instance, b.input, b.output) == NN_KERNEL_FAILED && b.output[0] == 0);
      bad_task = -1;
      CHECK(gives_right(instance, &b));
    }
    CHECK(nn_destroy(instance) == NN_OK);
  }
}

/* ---- Resources ---- */

static int threads_alive(void) {
  int count = 0;
  DIR *folder = opendir("/proc/self/task");
  CHECK(folder);
  for (struct dirent *entry; (entry = readdir(folder));) count += entry->d_name[0] != '.';
  closedir(folder);
  return count;
}

/* A joined thread may be listed for a moment more. */
static int threads_become(int count) {
  for (int i = 0; i < 500; i++) {
    if (threads_alive() == count) return 1;
    usleep(10000);
  }
  return 0;
}

static void rounds(void) {
  nn_model model = model_of(execute);
  fill(&b, 8);
  /* QEMU has a thread of its own, and ThreadSanitizer from our first one on. */
  CHECK(nn_destroy(created(&model, 2)) == NN_OK);
  usleep(100000);
  int before = threads_alive();
  for (int i = 0; i < 1000; i++) {
    nn_instance *instance = created(&model, 1 + i % 4);
    CHECK(i % 4 || threads_become(before)); /* one thread starts none */
    CHECK(gives_right(instance, &b));
    CHECK(nn_destroy(instance) == NN_OK);
  }
  CHECK(threads_become(before));
}

/* Neither the memory nor, with 63 stacks to place, the threads. */
static void no_memory(void) {
  nn_instance *instance;
  nn_model model = model_of(execute), large = model;
  struct rlimit limit;
  fill(&b, 1);
  large.arena_bytes = (size_t)1 << 30;
  CHECK(getrlimit(RLIMIT_AS, &limit) == 0);
  limit.rlim_cur = 24 << 20;
  CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
  CHECK(nn_create(&instance, &large, 1) == NN_NO_MEMORY && !instance);
  for (int i = 0; i < 5; i++)
    CHECK(nn_create(&instance, &model, 64) == NN_NO_MEMORY && !instance);
  CHECK(threads_become(1));
  instance = created(&model, 2);
  CHECK(gives_right(instance, &b) && nn_destroy(instance) == NN_OK);
}

/* More than an address space, where size_t has 32 bits. */
static void huge(void) {
  nn_instance *instance;
  nn_model model = model_of(execute);
  model.arena_bytes = sizeof(size_t) == 4 ? SIZE_MAX - 4096 : SIZE_MAX / 2;
  CHECK(nn_memory_bytes(&model, 64) > model.arena_bytes);
  CHECK(nn_create(&instance, &model, 64) == NN_NO_MEMORY && !instance);
  CHECK(nn_create_in(&instance, &model, weights, BYTES, 64) == NN_MEMORY_TOO_SMALL && !instance);
}

/* ---- Checks ---- */

static void features(void) {
  nn_model model = model_of(execute);
  nn_instance *instance;
  CHECK(nn_check_cpu("") == NN_OK);
  CHECK(nn_check_cpu("quantum") == NN_CPU_LACKS_FEATURES);
#if defined(__x86_64__)
  CHECK(nn_check_cpu("sse2 sse") == NN_OK && nn_check_cpu("sse2  sse ") == NN_OK);
  CHECK(nn_check_cpu("sse2 quantum sse") == NN_CPU_LACKS_FEATURES);
  CHECK(nn_check_cpu("sse2x") == NN_CPU_LACKS_FEATURES);
  CHECK(nn_check_cpu("ss") == NN_CPU_LACKS_FEATURES);
#endif
  model.features = "quantum";
  CHECK(nn_create(&instance, &model, 1) == NN_CPU_LACKS_FEATURES && !instance);
}

static void weights_checksum(void) {
  nn_model model = model_of(execute);
  CHECK(nn_crc32("123456789", 9) == 0xcbf43926u); /* the check value of CRC-32/ISO-HDLC */
  model.weights_crc = nn_crc32(weights, BYTES);
  CHECK(nn_check_weights(&model) == NN_OK);
  for (size_t byte = 0; byte < BYTES; byte += 97) {
    ((unsigned char *)weights)[byte] ^= 16;
    CHECK(nn_check_weights(&model) == NN_WEIGHTS_DAMAGED);
    ((unsigned char *)weights)[byte] ^= 16;
  }
  CHECK(nn_check_weights(&model) == NN_OK);
}

static void comparison(void) {
  const float expected[] = {-1, 0, -1e9f}, exact[] = {0, 0, 0};
  const float near[] = {0.5f, 0.25f, 100};
  CHECK(nn_compare(expected, expected, exact, 3) == NN_OK);
  CHECK(nn_compare((float[]){-1.5f, 0.25f, -1e9f + 64}, expected, near, 3) == NN_OK);
  CHECK(nn_compare((float[]){-0.5f, -0.25f, -1e9f - 64}, expected, near, 3) == NN_OK);
  CHECK(nn_compare((float[]){-1, 0, -1e9f + 64}, expected, exact, 3) == NN_GOLDEN_MISMATCH);
  CHECK(nn_compare((float[]){-1, 0.26f, -1e9f}, expected, near, 3) == NN_GOLDEN_MISMATCH);
  CHECK(nn_compare((float[]){-1, -0.26f, -1e9f}, expected, near, 3) == NN_GOLDEN_MISMATCH);
  CHECK(nn_compare((float[]){-1.6f, 0, -1e9f}, expected, near, 3) == NN_GOLDEN_MISMATCH);
  CHECK(nn_compare((float[]){-1, 0, -1e9f + 128}, expected, near, 3) == NN_GOLDEN_MISMATCH);
  const float infinite[] = {INFINITY, -INFINITY, NAN}, wide[] = {1e38f, 1e38f, 1e38f};
  CHECK(nn_compare(infinite, infinite, exact, 3) == NN_OK);
  for (int i = 0; i < 3; i++) {
    float output[3];
    for (int bad = 0; bad < 3; bad++) {
      memcpy(output, infinite, sizeof output);
      output[i] = bad == i ? 9 : infinite[bad];
      CHECK(nn_compare(output, infinite, wide, 3) == NN_GOLDEN_MISMATCH);
      memcpy(output, expected, sizeof output);
      output[i] = infinite[bad];
      CHECK(nn_compare(output, expected, wide, 3) == NN_GOLDEN_MISMATCH);
    }
  }
}

static void finite_input(void) {
  float input[37];
  CHECK(nn_check_finite(NULL, 1) == NN_NULL_POINTER);
  CHECK(nn_check_finite(input, 0) == NN_OK);
  for (int i = 0; i < 37; i++) input[i] = i % 2 ? FLT_MAX : -FLT_MAX;
  CHECK(nn_check_finite(input, 37) == NN_OK);
  const float bad[] = {INFINITY, -INFINITY, NAN, -NAN};
  for (int i = 0; i < 37; i++) {
    float kept = input[i];
    for (int k = 0; k < 4; k++) {
      input[i] = bad[k];
      CHECK(nn_check_finite(input, 37) == NN_INPUT_NOT_FINITE);
    }
    input[i] = kept;
  }
}

static void error_texts(void) {
  for (int code = NN_OK; code <= NN_INPUT_NOT_FINITE; code++) {
    CHECK(strlen(nn_error_text(code)) > 5 && !strchr(nn_error_text(code), '\n'));
    for (int other = -1; other < code; other++)
      CHECK(strcmp(nn_error_text(code), nn_error_text(other)) != 0);
  }
  CHECK(strcmp(nn_error_text(-1), nn_error_text(NN_INPUT_NOT_FINITE + 1)) == 0);
}

static const struct {
  const char *name;
  void (*check)(void);
} checks[] = {
#define NAMED(check) {#check, check}
    NAMED(results),
    NAMED(tasks),
    NAMED(pauses),
    NAMED(one_cpu),
    NAMED(alignment),
    NAMED(two_instances),
    NAMED(busy),
    NAMED(contended),
    NAMED(handed_over),
    NAMED(forked),
    NAMED(forked_while_running),
    NAMED(signals),
    NAMED(destroyed),
    NAMED(bad_buffers),
    NAMED(bad_threads),
    NAMED(caller_memory),
    NAMED(too_many),
    NAMED(workspaces),
    NAMED(workspace_limits),
    NAMED(failures),
    NAMED(rounds),
    NAMED(no_memory),
    NAMED(huge),
    NAMED(features),
    NAMED(weights_checksum),
    NAMED(comparison),
    NAMED(finite_input),
    NAMED(error_texts),
};

int main(int count, char **arguments) {
  size_t number = sizeof checks / sizeof checks[0];
  const char *wanted = count > 1 ? arguments[1] : NULL;
  for (int i = 0; i < SIZE; i++) weights[i] = (float)(i % 3);
  for (size_t i = 0; i < number; i++) {
    if (!wanted) puts(checks[i].name);
    if (wanted && strcmp(wanted, checks[i].name) == 0) {
      checks[i].check();
      return 0;
    }
  }
  if (wanted && strcmp(wanted, "crc") == 0) { /* of stdin */
    static unsigned char data[1 << 20];
    size_t bytes = fread(data, 1, sizeof data, stdin);
    for (size_t start = 0; start < 9 && start <= bytes; start++)
      printf("%lu\n", (unsigned long)nn_crc32(data + start, bytes - start));
    return 0;
  }
  if (wanted && strcmp(wanted, "cpu") == 0) { /* each name given: has this CPU it? */
    for (int i = 2; i < count; i++)
      if (nn_check_cpu(arguments[i]) == NN_OK) puts(arguments[i]);
    return 0;
  }
  return wanted ? 2 : 0;
}
