// A TCG plugin for qemu-aarch64: how often each translated block ran, and what a cache model made of its accesses.
//
// plugin.so,out=FILE[,caches=SETS:WAYS/SETS:WAYS][,private=LEVELS]
//
// `hint #0x60` in the program sets all counts to nothing, `hint #0x61` writes them; without either they are written at
// the end. A line of FILE is one block: address, instructions, executions, misses of each cache, bytes in hexadecimal.
// Counters are not atomic: one thread. A program that runs the tasks of a parallel region one after another (serial.c)
// begins each with `hint #0x64` to `hint #0x67`, the thread's number, and ends the region with `hint #0x62`: `part N`
// begins the lines of thread N - 1, `part 0` those outside of regions. Each thread has the first LEVELS caches for itself.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Of QEMU's qemu-plugin.h, API version 1 (QEMU 4.2 to 8.1), which Debian does not package.
#define EXPORT __attribute__((visibility("default")))
typedef uint64_t qemu_plugin_id_t;
typedef uint32_t qemu_plugin_meminfo_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { QEMU_PLUGIN_CB_NO_REGS };
enum { QEMU_PLUGIN_MEM_RW = 3 };
enum { QEMU_PLUGIN_INLINE_ADD_U64 };
typedef void (*tb_callback)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*udata_callback)(unsigned, void *);
typedef void (*mem_callback)(unsigned, qemu_plugin_meminfo_t, uint64_t, void *);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_callback);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, udata_callback, int, void *);
extern void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, mem_callback, int, int, void *);
extern void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
extern unsigned qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t);
EXPORT int qemu_plugin_version = 1;

#define BEGIN 0xd5032c1fu  // hint #0x60
#define END 0xd5032c3fu    // hint #0x61
#define SERIAL 0xd5032c5fu // hint #0x62
#define THREAD 0xd5032c9fu // hint #0x64; each further thread's is 0x20 more
#define THREADS 4
#define LINE_SHIFT 6       // 64-byte lines, as every Cortex-A here has
#define LEVELS 3

struct block {
  struct block *next;
  uint64_t address, count, misses[LEVELS];
  size_t instructions;
  uint32_t code[];
};

// Least recently used: `stamps` says when each line was touched last.
struct cache {
  unsigned sets, ways;
  uint64_t *tags, *stamps;
};

static struct block *blocks;
static struct cache caches[THREADS][LEVELS];
static unsigned levels, private_levels, thread, part;
static uint64_t now;
static const char *output;
static FILE *file;
static int written;

static void clear(void) {
  for (struct block *block = blocks; block; block = block->next) {
    block->count = 0;
    memset(block->misses, 0, sizeof block->misses);
  }
}

static void begin(unsigned cpu, void *data) {
  (void)cpu, (void)data;
  clear();
  if (file) fclose(file);
  file = NULL;
  part = 0;
}

static void write_part(void) {
  if (!file) file = fopen(output, "w");
  if (!file) return;
  if (part || ftell(file)) fprintf(file, "part %u\n", part);
  for (struct block *block = blocks; block; block = block->next) {
    if (!block->count) continue;
    fprintf(file, "%llx %zu %llu", (unsigned long long)block->address, block->instructions,
            (unsigned long long)block->count);
    for (unsigned level = 0; level < levels; level++)
      fprintf(file, " %llu", (unsigned long long)block->misses[level]);
    fputc(' ', file);
    for (size_t i = 0; i < block->instructions; i++) {
      const uint8_t *bytes = (const uint8_t *)&block->code[i];
      fprintf(file, "%02x%02x%02x%02x", bytes[0], bytes[1], bytes[2], bytes[3]);
    }
    fputc('\n', file);
  }
}

static void write_counts(void) {
  write_part();
  if (!file) return;
  // The last line proves that the disk was not full.
  fputs("end\n", file);
  fclose(file);
  file = NULL;
  written = 1;
}

static void next_part(unsigned cpu, void *data) {
  (void)cpu;
  write_part();
  clear();
  part = (unsigned)(uintptr_t)data;
  thread = part ? part - 1 : 0;
}

static void end(unsigned cpu, void *data) {
  (void)cpu, (void)data;
  write_counts();
}

static int missed(struct cache *cache, uint64_t line) {
  size_t first = line % cache->sets * cache->ways, oldest = first;
  for (size_t way = first; way < first + cache->ways; way++) {
    if (cache->tags[way] == line + 1) {
      cache->stamps[way] = ++now;
      return 0;
    }
    if (cache->stamps[way] < cache->stamps[oldest]) oldest = way;
  }
  cache->tags[oldest] = line + 1;
  cache->stamps[oldest] = ++now;
  return 1;
}

static void access_memory(unsigned cpu, qemu_plugin_meminfo_t info, uint64_t address, void *data) {
  (void)cpu;
  struct block *block = data;
  uint64_t last = (address + (1u << qemu_plugin_mem_size_shift(info)) - 1) >> LINE_SHIFT;
  for (uint64_t line = address >> LINE_SHIFT; line <= last; line++)
    for (unsigned level = 0; level < levels; level++) {
      if (!missed(&caches[level < private_levels ? thread : 0][level], line)) break;
      block->misses[level]++;
    }
}

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  size_t count = qemu_plugin_tb_n_insns(tb);
  struct block *block = calloc(1, sizeof *block + count * sizeof block->code[0]);
  if (!block) abort();
  block->address = qemu_plugin_tb_vaddr(tb);
  block->instructions = count;
  block->next = blocks;
  blocks = block;
  for (size_t i = 0; i < count; i++) {
    struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(tb, i);
    memcpy(&block->code[i], qemu_plugin_insn_data(instruction), sizeof block->code[i]);
    if (block->code[i] == BEGIN) qemu_plugin_register_vcpu_insn_exec_cb(instruction, begin, QEMU_PLUGIN_CB_NO_REGS, 0);
    if (block->code[i] == END) qemu_plugin_register_vcpu_insn_exec_cb(instruction, end, QEMU_PLUGIN_CB_NO_REGS, 0);
    for (unsigned to = 0; to <= THREADS; to++)
      if (block->code[i] == (to ? THREAD + 0x20 * (to - 1) : SERIAL))
        qemu_plugin_register_vcpu_insn_exec_cb(instruction, next_part, QEMU_PLUGIN_CB_NO_REGS, (void *)(uintptr_t)to);
    if (levels)
      qemu_plugin_register_vcpu_mem_cb(instruction, access_memory, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW, block);
  }
  qemu_plugin_register_vcpu_tb_exec_inline(tb, QEMU_PLUGIN_INLINE_ADD_U64, &block->count, 1);
}

static void at_exit(qemu_plugin_id_t id, void *data) {
  (void)id, (void)data;
  if (!written) write_counts();
}

static int add_caches(const char *text) {
  for (char *rest = (char *)text; *rest && levels < LEVELS; rest += *rest == '/', levels++) {
    unsigned sets = (unsigned)strtoul(rest, &rest, 10);
    if (*rest++ != ':') return 1;
    unsigned ways = (unsigned)strtoul(rest, &rest, 10);
    size_t lines = (size_t)sets * ways;
    for (unsigned to = 0; to < THREADS; to++) {
      struct cache *cache = &caches[to][levels];
      *cache = (struct cache){sets, ways, calloc(lines, sizeof *cache->tags), calloc(lines, sizeof *cache->stamps)};
      if (!lines || !cache->tags || !cache->stamps) return 1;
    }
  }
  return 0;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int count, char **words) {
  (void)info;
  for (int i = 0; i < count; i++) {
    if (!strncmp(words[i], "out=", 4)) output = strdup(words[i] + 4);
    if (!strncmp(words[i], "caches=", 7) && add_caches(words[i] + 7)) return 1;
    if (!strncmp(words[i], "private=", 8)) private_levels = (unsigned)strtoul(words[i] + 8, NULL, 10);
  }
  if (!output) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
  qemu_plugin_register_atexit_cb(id, at_exit, 0);
  return 0;
}
