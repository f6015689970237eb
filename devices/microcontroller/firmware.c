/* A bare Cortex-M program around a generated network, for QEMU with semihosting.
 *
 * Reads inputs from "input.bin", does the self-test and measures the stack where "probe.bin" exists, writes outputs to "output.bin" and figures to "figures.bin" (int32,
 * little-endian: self-test's code, run's code, stack bytes, ticks of each inference; with TRACE also
 * four counts a step). -DSTEPS: how many.
 */
#include <stddef.h>
#include <stdint.h>

#include "harness.h"

#ifdef TRACE
#include "trace.h"
#endif

extern uint32_t stack_bottom[], stack_top[], data_start[], data_end[], data_load[], bss_start[], bss_end[];

/* Semihosting (Arm IHI 0054): operation in r0, its block in r1. */
enum { SYS_OPEN = 1, SYS_CLOSE = 2, SYS_WRITE = 5, SYS_READ = 6, SYS_EXIT = 0x18, SYS_EXIT_EXTENDED = 0x20 };

static int32_t host(int32_t operation, const void *block) {
  register int32_t r0 __asm__("r0") = operation;
  register const void *r1 __asm__("r1") = block;
  __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

static int32_t open_file(const char *name, int32_t mode, int32_t length) {
  const uintptr_t block[3] = {(uintptr_t)name, (uintptr_t)mode, (uintptr_t)length};
  return host(SYS_OPEN, block);
}

/* The bytes that were not transferred. */
static int32_t transfer(int32_t operation, int32_t file, const void *data, uint32_t bytes) {
  const uintptr_t block[3] = {(uintptr_t)file, (uintptr_t)data, bytes};
  return host(operation, block);
}

static void leave(int32_t code) {
  const uintptr_t block[2] = {0x20026 /* ADP_Stopped_ApplicationExit */, (uintptr_t)code};
  host(SYS_EXIT_EXTENDED, block);
  for (;;) {
  }
}

/* SysTick: 24 bits, counts down at the processor's clock, with an interrupt whenever it begins anew. */
#define SYST_CSR (*(volatile uint32_t *)0xE000E010)
#define SYST_RVR (*(volatile uint32_t *)0xE000E014)
#define SYST_CVR (*(volatile uint32_t *)0xE000E018)
#define ICSR (*(volatile uint32_t *)0xE000ED04)
#define PENDSTSET (1u << 26)
#define CPACR (*(volatile uint32_t *)0xE000ED88)
#define CCR (*(volatile uint32_t *)0xE000ED14)
#ifndef TICKS
#define TICKS 0xFFFFFFu
#endif

static volatile uint32_t rounds;

static void count_round(void) {
  /* Figures are int32. */
  if (++rounds > INT32_MAX / (TICKS + 1) - 2) leave(104);
}

/* Ticks since `rounds` was 0. */
static uint32_t now(void) {
  __asm__ volatile("cpsid i" ::: "memory");
  uint32_t left = SYST_CVR, round = rounds;
  if (ICSR & PENDSTSET) {
    left = SYST_CVR;
    round++;
  }
  __asm__ volatile("cpsie i" ::: "memory");
  return round * (TICKS + 1) + (TICKS - left);
}

#ifdef TRACE
static int32_t trace_counts[STEPS + 1][4];
static uint32_t trace_last;
static int32_t trace_current;

void trace_mark(int32_t kind) {
  const uint32_t time = now();
  trace_counts[trace_current][kind] += (int32_t)(time - trace_last);
  trace_last = time;
}

void trace_step(int32_t step) {
  trace_mark(3);
  trace_current = step;
}
#endif

#ifndef TRACE
#define PAINT 0xA5A5A5A5u

/* The bytes of stack that a call used: the painted words below the caller's frame that it wrote to. */
static __attribute__((noinline)) int32_t measure_stack(int32_t *code) {
  volatile uint32_t *const here = (volatile uint32_t *)__builtin_frame_address(0) - 64;
  for (volatile uint32_t *word = stack_bottom; word < here; word++) *word = PAINT;
  /* An interrupt would take stack too. */
  __asm__ volatile("cpsid i" ::: "memory");
  *code = FUNCTION(NAME, _run)(INPUTS, OUTPUTS, ARENAS);
  __asm__ volatile("cpsie i" ::: "memory");
  volatile uint32_t *word = stack_bottom;
  while (word < here && *word == PAINT) word++;
  return (int32_t)((uintptr_t)__builtin_frame_address(0) - (uintptr_t)word);
}
#endif

/* Whether the inputs of one more inference are there. */
static int read_inputs(int32_t file) {
  for (int i = 0; i < PLACES; i++)
    if (transfer(SYS_READ, file, arena.bytes + places[i].begin, places[i].bytes) != 0) return 0;
  return 1;
}

static void work(void) {
  int32_t figures[4] = {0};
  const int32_t in = open_file("input.bin", 1, 9), out = open_file("output.bin", 5, 10);
  const int32_t report = open_file("figures.bin", 5, 11);
  if (in < 0 || out < 0 || report < 0) leave(100);
#ifndef TRACE
  const int probe = open_file("probe.bin", 1, 9) >= 0;
  if (probe) figures[0] = FUNCTION(NAME, _self_test)(OUTPUTS, ARENAS);
#endif
  while (read_inputs(in)) {
    rounds = 0;
#ifdef TRACE
    trace_last = now();
#endif
    const uint32_t start = now();
    figures[1] = FUNCTION(NAME, _run)(INPUTS, OUTPUTS, ARENAS);
    figures[3] = (int32_t)(now() - start);
    if (figures[1] != 0) leave(101);
    if (transfer(SYS_WRITE, out, outputs.bytes, OUTPUT_BYTES) != 0) leave(102);
#ifndef TRACE
    /* The inputs may be overwritten by now; the stack does not depend on it. */
    if (probe && figures[2] == 0) figures[2] = measure_stack(&figures[1]);
#endif
    if (transfer(SYS_WRITE, report, figures, sizeof figures) != 0) leave(102);
  }
#ifdef TRACE
  if (transfer(SYS_WRITE, report, trace_counts, sizeof trace_counts) != 0) leave(102);
#endif
  leave(0);
}

void reset(void) {
  CPACR |= 0xFu << 20; /* floating point and MVE on */
#ifndef __ARM_FEATURE_UNALIGNED
  CCR |= 1u << 3; /* code for a core that faults at unaligned addresses: this one must, too */
#endif
  __asm__ volatile("dsb\n isb" ::: "memory");
  const uint32_t *from = data_load;
  for (uint32_t *word = data_start; word < data_end; word++) *word = *from++;
  for (uint32_t *word = bss_start; word < bss_end; word++) *word = 0;
  SYST_RVR = TICKS;
  SYST_CVR = 0;
  SYST_CSR = 7; /* on, the processor's clock, with its interrupt */
  work();
}

static void fault(void) { leave(103); }

__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))stack_top, reset, fault, fault, fault, fault, fault, fault, 0, 0, 0, fault, fault, 0, fault, count_round,
};
