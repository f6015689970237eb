// Preloaded into an emulated program: the tasks of a parallel region run one after another on one thread, each behind a
// mark that says which thread would have run it (plugin.c). So counts are exact, and the same in every run.
//
// NETSHIP_METER_THREADS is the number of threads. OpenMP's regions as GCC's libgomp has them (libgomp.h: GOMP_parallel) and
// TVM's (c_backend_api.h: TVMBackendParallelLaunch) are served; a region inside a task runs as one task.

#include <stdint.h>
#include <stdlib.h>

enum { MOST = 4 };
typedef struct {
  void *sync_handle;
  int32_t num_task;
} Environment;
typedef int (*Task)(int, Environment *, void *);

static int threads, in_region, number, count = 1;

__attribute__((constructor)) static void start(void) {
  const char *text = getenv("NETSHIP_METER_THREADS");
  threads = text ? atoi(text) : 1;
  if (threads < 1 || threads > MOST) threads = 1;
}

static void mark(int thread) {
  switch (thread) {
    case 0: __asm__ volatile("hint #0x64" ::: "memory"); break;
    case 1: __asm__ volatile("hint #0x65" ::: "memory"); break;
    case 2: __asm__ volatile("hint #0x66" ::: "memory"); break;
    case 3: __asm__ volatile("hint #0x67" ::: "memory"); break;
    default: __asm__ volatile("hint #0x62" ::: "memory");
  }
}

static int enter(int asked) {
  if (in_region || asked < 2 || threads < 2) return 0;
  in_region = 1;
  count = asked < threads ? asked : threads;
  return 1;
}

static void leave(void) {
  mark(-1);
  in_region = number = 0;
  count = 1;
}

void GOMP_parallel(void (*task)(void *), void *data, unsigned asked, unsigned flags) {
  (void)flags;
  if (!enter(asked ? (int)asked : threads)) {
    task(data);
    return;
  }
  for (number = 0; number < count; number++) {
    mark(number);
    task(data);
  }
  leave();
}
int omp_get_num_threads(void) { return count; }
int omp_get_max_threads(void) { return threads; }
int omp_get_thread_num(void) { return number; }
int omp_get_num_procs(void) { return threads; }
int omp_in_parallel(void) { return in_region; }
int omp_get_dynamic(void) { return 0; }
void omp_set_dynamic(int on) { (void)on; }
void omp_set_num_threads(int asked) { (void)asked; }

int netship_parallel_launch(Task task, void *data, int tasks) {
  if (!enter(tasks ? tasks : threads)) {
    Environment one = {0, tasks ? tasks : 1};
    for (int i = 0; i < one.num_task; i++)
      if (task(i, &one, data)) return -1;
    return 0;
  }
  // TVM's pool gives task I to thread I; more tasks than threads go round.
  Environment all = {0, tasks ? tasks : count};
  int failed = 0;
  for (number = 0; number < count; number++) {
    mark(number);
    for (int i = number; i < all.num_task; i += count) failed |= task(i, &all, data) != 0;
  }
  leave();
  return failed ? -1 : 0;
}
