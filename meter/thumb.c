// A TCG plugin for qemu-system-arm: what each step of a C project runs, and what a model of flash and caches made of it.
//
// plugin.so,out=FILE,steps=N[,fetch=SETS:WAYS:SHIFT][,read=SETS:WAYS:SHIFT][,flash=FIRST:LAST:CACHED]...
//
// The instructions `hint #192 + STEP / 64` and `hint #128 + STEP % 64` begin a step (marks.h). Step 0 begins FILE anew,
// step N ends it. A line of FILE is "step N", or one block of that step: address, bytes, executions, executions that did
// not go on behind the block, fetch and read misses (`misses`), bytes in hexadecimal. Lines of a cache have 1 << SHIFT
// bytes; with one way and one set a cache is the buffer of a flash that has none. Without `read`, reads share the
// first cache. Only reads from a `flash` range count; addresses are hexadecimal, and CACHED is 0 or 1.

#include <stdbool.h>
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
typedef void (*tb_callback)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*udata_callback)(unsigned, void *);
typedef void (*mem_callback)(unsigned, qemu_plugin_meminfo_t, uint64_t, void *);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_callback);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, udata_callback, int, void *);
extern void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, udata_callback, int, void *);
extern void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, mem_callback, int, int, void *);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
extern unsigned qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t);
extern bool qemu_plugin_mem_is_store(qemu_plugin_meminfo_t);
EXPORT int qemu_plugin_version = 1;

// Lines that a cache lacked: fetched after a jump, fetched after the line before them; read from each of the ranges.
enum { FETCH_JUMP, FETCH_NEXT, READ, RANGES = 3, MISSES = READ + RANGES };

struct block {
  struct block *next;
  uint32_t address, bytes;
  uint64_t executions, jumps, misses[MISSES];
  uint8_t code[];
};

// Least recently used: `stamps` says when each line was touched last.
struct cache {
  unsigned sets, ways, shift;
  uint32_t *tags;
  uint64_t *stamps;
};
static struct range {
  uint32_t first, last, cached;
} ranges[RANGES];

static struct block *blocks, *previous;
static struct cache fetch, read_own, *read_cache = &fetch;
static unsigned range_count;
static uint32_t fetched;
static uint64_t now;
static const char *output;
static FILE *file;
static unsigned steps, step;

static void write_step(void) {
  fprintf(file, "step %u\n", step);
  for (struct block *block = blocks; block; block = block->next) {
    if (!block->executions) continue;
    fprintf(file, "%x %u %llu %llu", block->address, block->bytes, (unsigned long long)block->executions,
            (unsigned long long)block->jumps);
    for (unsigned i = 0; i < MISSES; i++) fprintf(file, " %llu", (unsigned long long)block->misses[i]);
    fputc(' ', file);
    for (uint32_t i = 0; i < block->bytes; i++) fprintf(file, "%02x", block->code[i]);
    fputc('\n', file);
  }
}

static void begin_step(unsigned cpu, void *data) {
  (void)cpu;
  const uint8_t *code = data;
  if (code[2] >= 192) {
    if (file) write_step();
    step = (code[2] - 192u) * 64;
    return;
  }
  step += code[2] - 128u;
  if (step == 0) {
    if (file) fclose(file);
    file = fopen(output, "w");
  }
  for (struct block *block = blocks; block; block = block->next) {
    block->executions = block->jumps = 0;
    memset(block->misses, 0, sizeof block->misses);
  }
  if (step == steps && file) {
    // The last line proves that the disk was not full.
    fputs("end\n", file);
    fclose(file);
    file = 0;
  }
}

static int missed(struct cache *cache, uint32_t line) {
  const size_t first = (size_t)(line % cache->sets) * cache->ways;
  size_t oldest = first;
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

static int flash_range(uint32_t address) {
  for (unsigned i = 0; i < range_count; i++)
    if (address >= ranges[i].first && address <= ranges[i].last) return (int)i;
  return -1;
}

static void execute(unsigned cpu, void *data) {
  (void)cpu;
  struct block *block = data;
  block->executions++;
  if (previous && previous->address + previous->bytes != block->address) previous->jumps++;
  previous = block;
  if (!fetch.sets) return;
  const uint32_t last = (block->address + block->bytes - 1) >> fetch.shift;
  for (uint32_t line = block->address >> fetch.shift; line <= last; line++) {
    if (missed(&fetch, line)) block->misses[line == fetched + 1 ? FETCH_NEXT : FETCH_JUMP]++;
    fetched = line;
  }
}

static void access_memory(unsigned cpu, qemu_plugin_meminfo_t info, uint64_t address, void *data) {
  (void)cpu;
  struct block *block = data;
  const int range = flash_range((uint32_t)address);
  if (range < 0 || qemu_plugin_mem_is_store(info)) return;
  const unsigned shift = read_cache->shift;
  const uint32_t last = ((uint32_t)address + (1u << qemu_plugin_mem_size_shift(info)) - 1) >> shift;
  for (uint32_t line = (uint32_t)address >> shift; line <= last; line++)
    if (!ranges[range].cached || missed(read_cache, line)) block->misses[READ + range]++;
}

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  const size_t count = qemu_plugin_tb_n_insns(tb);
  struct block *block = calloc(1, sizeof *block + count * 4);
  if (!block) abort();
  block->address = (uint32_t)qemu_plugin_tb_vaddr(tb);
  block->next = blocks;
  blocks = block;
  for (size_t i = 0; i < count; i++) {
    struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(tb, i);
    uint8_t *code = block->code + block->bytes;
    // At the end of a page QEMU hands over the next halfword, too; 0b11101 and 0b1111 begin an instruction of four bytes.
    const uint8_t *data = qemu_plugin_insn_data(instruction);
    const size_t bytes = data[1] >> 3 >= 0x1d ? 4 : 2;
    memcpy(code, data, bytes);
    block->bytes += (uint32_t)bytes;
    if (bytes == 4 && code[0] == 0xaf && code[1] == 0xf3 && code[3] == 0x80 && code[2] >= 128 && code[2] < 240)
      qemu_plugin_register_vcpu_insn_exec_cb(instruction, begin_step, QEMU_PLUGIN_CB_NO_REGS, code);
    if (range_count)
      qemu_plugin_register_vcpu_mem_cb(instruction, access_memory, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW, block);
  }
  qemu_plugin_register_vcpu_tb_exec_cb(tb, execute, QEMU_PLUGIN_CB_NO_REGS, block);
}

static int add_cache(const char *text, struct cache *cache) {
  if (sscanf(text, "%u:%u:%u", &cache->sets, &cache->ways, &cache->shift) != 3) return 1;
  const size_t lines = (size_t)cache->sets * cache->ways;
  cache->tags = calloc(lines, sizeof *cache->tags);
  cache->stamps = calloc(lines, sizeof *cache->stamps);
  return !lines || !cache->tags || !cache->stamps;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int count, char **words) {
  (void)info;
  for (int i = 0; i < count; i++) {
    struct range *range = &ranges[range_count];
    if (!strncmp(words[i], "out=", 4)) output = strdup(words[i] + 4);
    if (!strncmp(words[i], "steps=", 6)) steps = (unsigned)atoi(words[i] + 6);
    if (!strncmp(words[i], "fetch=", 6) && add_cache(words[i] + 6, &fetch)) return 1;
    if (!strncmp(words[i], "read=", 5)) {
      if (add_cache(words[i] + 5, &read_own)) return 1;
      read_cache = &read_own;
    }
    if (!strncmp(words[i], "flash=", 6)) {
      if (range_count == RANGES || sscanf(words[i] + 6, "%x:%x:%u", &range->first, &range->last, &range->cached) != 3)
        return 1;
      range_count++;
    }
  }
  if (!output || !steps) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
  return 0;
}
