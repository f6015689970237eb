/* Runs a standalone library for devices/sessions/runner.py, over two pipes.

   Two ways to build it:
     with -DSTATIC_NAME=NAME it includes NAME.h, is linked to libNAME.a and takes no arguments;
     without, `runner /path/to/libNAME.so NAME` loads that library.
   -DINPUTS, -DOUTPUTS, -DTYPES and -DPOINTERS say how many of each it has, and which pointers NAME_run takes.

   It first sends one answer, then one to each request:
     request   u32 command, u32 bytes, that many bytes
     answer    u32 status, u32 bytes, that many bytes (status 1: words that say what failed)
   Numbers are little-endian. It ends when its standard input does, even in mid-inference. */

#define _DEFAULT_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* The same numbers as class Command of devices/sessions/runner.py. */
enum { CREATE = 1, INPUT, RUN, TIME, SELF_TEST, MEMORY, QUIT };
enum { ANSWERED, FAILED };
enum { LONGEST_TEXT = 512, LONGEST_BATCH = 64, ALIGNMENT = 64, MARGIN = 4096, BAD_REQUEST = 2 };
/* Bytes of all inputs, and of all outputs. */
static const uint64_t LARGEST = UINT64_C(1) << 29;
/* A signalling NaN, which no arithmetic gives. */
static const uint32_t UNWRITTEN = 0x7fa0beef;

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define QUOTE_(a) #a
#define QUOTE(a) QUOTE_(a)

#ifdef STATIC_NAME
#include QUOTE(STATIC_NAME.h)
#define instance_t JOIN(STATIC_NAME, _t)
#else
#include <dlfcn.h>
typedef struct instance instance_t;
#endif

#define FUNCTIONS(FUNCTION)                                          \
    FUNCTION(const char *, version, (void))                          \
    FUNCTION(size_t, workspace_bytes, (void))                        \
    FUNCTION(instance_t *, create, (int threads))                    \
    FUNCTION(int, last_error, (void))                                \
    FUNCTION(const char *, error_text, (int code))                   \
    FUNCTION(int, run, (instance_t *, TYPES))                           \
    FUNCTION(void, destroy, (instance_t *))                          \
    FUNCTION(int, self_test, (void))

#define MEMBER(type, function, arguments) type(*function) arguments;
/* Structures have no tags here: NAME.h declares struct NAME, of any name. */
static struct {
    FUNCTIONS(MEMBER)
} model;
static const char *model_name;
static instance_t *instance;
static struct {
    unsigned char *data;
    size_t bytes;
} inputs[INPUTS];
static size_t all_input_bytes;
static struct {
    unsigned char *data;
    size_t bytes, item; /* of all, of one element */
} outputs[OUTPUTS];
/* Of all requests but INPUT. */
static union {
    struct {
        uint64_t threads, input_bytes[INPUTS];
        struct {
            uint64_t bytes, item;
        } outputs[OUTPUTS];
    } creation;
    uint32_t repeat;
} payload;
static int answers;

static int read_all(void *data, size_t bytes)
{
    for (char *next = data; bytes > 0;) {
        ssize_t got = read(STDIN_FILENO, next, bytes);
        if (got > 0) {
            next += got;
            bytes -= (size_t)got;
        } else if (got == 0 || errno != EINTR) {
            return 0;
        }
    }
    return 1;
}

static void write_all(const void *data, size_t bytes)
{
    for (const char *next = data; bytes > 0;) {
        ssize_t put = write(answers, next, bytes);
        if (put > 0) {
            next += put;
            bytes -= (size_t)put;
        } else if (errno != EINTR) {
            _exit(0);
        }
    }
}

static void begin_answer(uint32_t status, size_t bytes)
{
    uint32_t header[] = {status, (uint32_t)bytes};
    write_all(header, sizeof header);
}

static void send_answer(uint32_t status, const void *data, size_t bytes)
{
    begin_answer(status, bytes);
    write_all(data, bytes);
}

static void answer(const void *data, size_t bytes) { send_answer(ANSWERED, data, bytes); }

static void fail(const char *format, ...)
{
    char text[LONGEST_TEXT];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    send_answer(FAILED, text, strlen(text));
}

static void fail_with(const char *function, int code)
{
    const char *text = model.error_text(code);
    fail("%s_%s gave error %d (%s)", model_name, function, code, text ? text : "it has no text");
}

/* For requests that devices/sessions/runner.py never sends. */
static void bad_request(const char *what)
{
    fprintf(stderr, "runner: %s\n", what);
    exit(BAD_REQUEST);
}

static void *end_with_parent(void *unused)
{
    struct pollfd parent = {.fd = STDIN_FILENO};
    (void)unused;
    while (poll(&parent, 1, -1) < 1)
        continue;
    _exit(0);
}

/* Memory for a tensor and `margin` bytes after it, then a page that must not be touched. */
static unsigned char *room(size_t bytes, size_t margin)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t whole = (bytes + margin + ALIGNMENT + page - 1) / page * page;
    char *start = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + whole, page, PROT_NONE))
        return NULL;
    size_t offset = whole - margin - bytes;
    return (unsigned char *)(start + offset - offset % ALIGNMENT);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

#ifdef STATIC_NAME
/* The cast is for NAME_run, whose pointers have the types of its tensors. */
#define ASSIGN(type, function, arguments) model.function = (type(*) arguments)JOIN(STATIC_NAME, _##function);
static int load(char **arguments)
{
    (void)arguments;
    model_name = QUOTE(STATIC_NAME);
    FUNCTIONS(ASSIGN)
    return 1;
}
#else
static int look_up(void *library, const char *function, void *pointer)
{
    char symbol[LONGEST_TEXT];
    snprintf(symbol, sizeof symbol, "%s_%s", model_name, function);
    void *found = dlsym(library, symbol);
    if (found == NULL)
        fail("it has no function %s", symbol);
    memcpy(pointer, &found, sizeof found);
    return found != NULL;
}

#define LOOK_UP(type, function, arguments) &&look_up(library, #function, &model.function)
static int load(char **arguments)
{
    if (arguments[0] == NULL || arguments[1] == NULL || arguments[2] == NULL)
        bad_request("needs a library and its name");
    model_name = arguments[2];
    void *library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        fail("cannot be loaded: %s", dlerror());
    return library != NULL FUNCTIONS(LOOK_UP);
}
#endif

/* u64 bytes of workspace, then the version. */
static void greet(void)
{
    char hello[sizeof(uint64_t) + LONGEST_TEXT];
    uint64_t workspace = model.workspace_bytes();
    memcpy(hello, &workspace, sizeof workspace);
    snprintf(hello + sizeof workspace, LONGEST_TEXT, "%s", model.version());
    answer(hello, sizeof workspace + strlen(hello + sizeof workspace));
}

static void create(void)
{
    uint64_t all = 0, given = 0;
    if (instance)
        bad_request("created twice");
    for (int i = 0; i < OUTPUTS; i++)
        all += payload.creation.outputs[i].bytes > LARGEST ? LARGEST + 1 : payload.creation.outputs[i].bytes;
    for (int i = 0; i < INPUTS; i++)
        given += payload.creation.input_bytes[i] > LARGEST ? LARGEST + 1 : payload.creation.input_bytes[i];
    if (given > LARGEST || all > LARGEST) {
        fail("its inputs or its outputs have more than %llu bytes", (unsigned long long)LARGEST);
        return;
    }
    int missing = 0;
    all_input_bytes = (size_t)given;
    for (int i = 0; i < INPUTS; i++) {
        inputs[i].bytes = (size_t)payload.creation.input_bytes[i];
        inputs[i].data = room(inputs[i].bytes, 0);
        missing = missing || inputs[i].data == NULL;
    }
    for (int i = 0; i < OUTPUTS; i++) {
        outputs[i].bytes = (size_t)payload.creation.outputs[i].bytes;
        outputs[i].item = (size_t)payload.creation.outputs[i].item;
        outputs[i].data = room(outputs[i].bytes, MARGIN);
        missing = missing || outputs[i].data == NULL;
    }
    if (missing) {
        fail("no memory for its inputs and outputs");
        return;
    }
    instance = model.create((int)payload.creation.threads);
    if (instance)
        answer(NULL, 0);
    else
        fail_with("create", model.last_error());
}

static int read_inputs(void)
{
    for (int i = 0; i < INPUTS; i++)
        if (!read_all(inputs[i].data, inputs[i].bytes))
            return 0;
    return 1;
}

static int infer(void) { return model.run(instance, POINTERS); }

/* The number of words in [first, end) of an output and its margin that are still as `run` filled them. */
static size_t count_unwritten(const unsigned char *output, size_t first, size_t end)
{
    size_t unwritten = 0;
    for (size_t i = first; i < end; i++)
        unwritten += memcmp(output + i * sizeof UNWRITTEN, &UNWRITTEN, sizeof UNWRITTEN) == 0;
    return unwritten;
}

static void run(void)
{
    size_t word = sizeof UNWRITTEN, elements = 0, all = 0, unwritten = 0;
    int behind = 0;
    for (int i = 0; i < OUTPUTS; i++)
        for (size_t at = 0; at + word <= outputs[i].bytes + MARGIN; at += word)
            memcpy(outputs[i].data + at, &UNWRITTEN, word);
    int code = infer();
    for (int i = 0; i < OUTPUTS; i++) {
        size_t bytes = outputs[i].bytes, item = outputs[i].item;
        size_t first = (bytes + word - 1) / word, end = (bytes + MARGIN) / word;
        all += bytes;
        elements += bytes / item;
        unwritten += (count_unwritten(outputs[i].data, 0, bytes / word) * word + item - 1) / item;
        behind = behind || count_unwritten(outputs[i].data, first, end) < end - first;
    }
    if (code)
        fail_with("run", code);
    else if (unwritten)
        fail("%s_run leaves %zu of %zu outputs unwritten", model_name, unwritten, elements);
    else if (behind)
        fail("%s_run writes behind its %zu outputs", model_name, elements);
    else {
        begin_answer(ANSWERED, all);
        for (int i = 0; i < OUTPUTS; i++)
            write_all(outputs[i].data, outputs[i].bytes);
    }
}

static void time_runs(uint32_t repeat)
{
    static double seconds[LONGEST_BATCH];
    if (repeat > LONGEST_BATCH)
        bad_request("too many inferences at once");
    for (uint32_t i = 0; i < repeat; i++) {
        double start = now();
        int code = infer();
        seconds[i] = now() - start;
        if (code) {
            fail_with("run", code);
            return;
        }
    }
    answer(seconds, repeat * sizeof *seconds);
}

static uint64_t status_bytes(const char *status, const char *field)
{
    const char *found = strstr(status, field);
    return found ? 1024 * (uint64_t)strtoul(found + strlen(field), NULL, 10) : 0;
}

/* u64 bytes of resident memory now, u64 at the highest: proc(5), /proc/pid/status. */
static void memory(void)
{
    char status[8192];
    int file = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? -1 : read(file, status, sizeof status - 1);
    if (file >= 0)
        close(file);
    if (got < 0) {
        fail("/proc/self/status: %s", strerror(errno));
        return;
    }
    status[got] = '\0';
    uint64_t bytes[] = {status_bytes(status, "VmRSS:"), status_bytes(status, "VmHWM:")};
    answer(bytes, sizeof bytes);
}

static void self_test(void)
{
    int code = model.self_test();
    if (code)
        fail_with("self_test", code);
    else
        answer(NULL, 0);
}

static size_t payload_bytes(uint32_t command)
{
    switch (command) {
    case CREATE:
        return sizeof payload.creation;
    case INPUT:
        return all_input_bytes;
    case TIME:
        return sizeof(uint32_t);
    default:
        return 0;
    }
}

static void serve(uint32_t command)
{
    switch (command) {
    case CREATE:
        create();
        break;
    case INPUT:
        answer(NULL, 0);
        break;
    case RUN:
        run();
        break;
    case TIME:
        time_runs(payload.repeat);
        break;
    case SELF_TEST:
        self_test();
        break;
    case MEMORY:
        memory();
        break;
    case QUIT:
        if (instance)
            model.destroy(instance);
        answer(NULL, 0);
        exit(0);
    default:
        bad_request("unknown command");
    }
}

int main(int count, char **arguments)
{
    (void)count;
    struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    /* What a library prints must not get between the answers. */
    answers = dup(STDOUT_FILENO);
    pthread_t watcher;
    if (answers < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0 ||
        pthread_create(&watcher, NULL, end_with_parent, NULL)) {
        perror("runner");
        return 1;
    }
    if (!load(arguments))
        return 1;
    greet();
    uint32_t header[2];
    while (read_all(header, sizeof header)) {
        uint32_t command = header[0], bytes = header[1];
        if (bytes != payload_bytes(command))
            bad_request("a request of a wrong size");
        if (instance == NULL && (command == INPUT || command == RUN || command == TIME))
            bad_request("not created yet");
        if (!(command == INPUT ? read_inputs() : read_all(&payload, bytes)))
            break;
        serve(command);
    }
    return 0;
}
