/* Faults of a file system, a clock and a network, thrown at chosen system calls of chosen processes.
 *
 * Preloaded into every process of a sweep. The rules lie in a file that all of them and the campaign map ($CHAOS_BOARD; tests/chaos/shim.py
 * writes it), so that a rule fires as often as it says among all processes together, can be taken back at any time, and tells that it fired.
 * A rule fails a call, writes half of what was asked, or holds the process there until it is let go. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <netdb.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { MAIN = 1, SERVER = 2, OTHER = 4 };                      /* the program of a process */
enum { OPEN_W = 1, OPEN_R = 2, WRITE = 4, RENAME = 8, FSYNC = 16, MKDIR = 32, UNLINK = 64, FLOCK = 128, CONNECT = 256, LOOKUP = 512, READ = 1024 };
enum { FAIL = 0, HALF = 1, HOLD = 2 };
#define RULES 32
#define HOLD_MS 30000

struct rule { int32_t armed, programs, depths, calls, action, value, skip, times, seen, fired, go, pid; char path[200], text[96]; };
struct board { int64_t clock_ns; int32_t no_flock, rules; struct rule rule[RULES]; };

static volatile struct board *board;
static int program = OTHER, depth;                             /* depth: forks since the last exec */

static void forked(void) { depth++; }

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("CHAOS_BOARD");
    int fd = file ? open(file, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof(struct board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    char line[4096];
    int command = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = command < 0 ? 0 : read(command, line, sizeof line);
    if (command >= 0) close(command);
    if (length > 0 && memmem(line, length, "run.server", 10)) program = SERVER;
    else if (length > 0 && memmem(line, length, "slimbench", 9)) program = MAIN;
    pthread_atfork(NULL, NULL, forked);
    if (mapped != MAP_FAILED) board = mapped;
}

/* Whether a rule fires at this call: its number, or -1. An errno is set; a hold has passed when this returns. */
static int strike(int call, const char *path, const void *text, size_t length) {
    if (!board) return -1;
    int saved = errno;
    for (int i = 0; i < board->rules; i++) {
        volatile struct rule *rule = &board->rule[i];
        if (!rule->armed || !(rule->calls & call) || !(rule->programs & program) || !(rule->depths & (1 << (depth > 2 ? 2 : depth)))) continue;
        if (path && rule->path[0] && fnmatch((const char *)rule->path, path, 0)) continue;
        if (rule->text[0] && (!text || !memmem(text, length, (const char *)rule->text, strlen((const char *)rule->text)))) continue;
        if (__sync_fetch_and_add(&rule->seen, 1) < rule->skip) continue;
        if (__sync_fetch_and_add(&rule->fired, 1) >= rule->times) { rule->armed = 0; continue; }
        if (rule->action == HOLD) {
            rule->pid = getpid();
            __sync_synchronize();
            struct timespec moment = {0, 2000000};
            for (int waited = 0; !rule->go && waited < HOLD_MS; waited += 2) nanosleep(&moment, NULL);
            rule->armed = 0;
            errno = saved;
            return -1;
        }
        errno = rule->action == FAIL ? rule->value : saved;
        return i;
    }
    errno = saved;
    return -1;
}

static int wants(int call) {
    if (!board) return 0;
    for (int i = 0; i < board->rules; i++)
        if (board->rule[i].armed && (board->rule[i].calls & call)) return 1;
    return 0;
}

static const char *whole(int folder, const char *path, char *buffer, size_t size) {
    if (!path) return "";
    if (path[0] == '/') return path;
    char link[64], base[2048];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, base, sizeof base - 1);
    if (length < 0) return path;
    base[length] = 0;
    snprintf(buffer, size, "%s/%s", base, path);
    return buffer;
}

static int strikes(int call, int folder, const char *path) {
    char buffer[4096];
    return wants(call) && strike(call, whole(folder, path, buffer, sizeof buffer), NULL, 0) >= 0;
}

static int strike_fd(int call, int fd, const void *text, size_t length) {
    char link[64], path[2048];
    if (!wants(call)) return -1;
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (got < 0) return -1;
    path[got] = 0;
    return strike(call, path, text, length);
}

#define REAL(name) static typeof(&name) real; if (!real) real = (typeof(&name))dlsym(RTLD_NEXT, #name)

static int opening(int flags) { return (flags & (O_WRONLY | O_RDWR | O_CREAT)) ? OPEN_W : OPEN_R; }

#define OPENER(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        return strikes(opening(flags), AT_FDCWD, path) ? -1 : real(path, flags, mode); }
OPENER(open)
OPENER(open64)
#define OPENER_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        return strikes(opening(flags), folder, path) ? -1 : real(folder, path, flags, mode); }
OPENER_AT(openat)
OPENER_AT(openat64)

static int half(int struck) { return struck >= 0 && board->rule[struck].action == HALF; }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    int struck = strike_fd(WRITE, fd, data, size);
    return half(struck) && size > 1 ? real(fd, data, size / 2) : struck >= 0 && !half(struck) ? -1 : real(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    int struck = strike_fd(WRITE, fd, data, size);
    return half(struck) && size > 1 ? real(fd, data, size / 2, at) : struck >= 0 && !half(struck) ? -1 : real(fd, data, size, at);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) { REAL(sendfile64); return strike_fd(WRITE, to, NULL, 0) >= 0 ? -1 : real(to, from, at, size); }
ssize_t read(int fd, void *data, size_t size) { REAL(read); return strike_fd(READ, fd, NULL, 0) >= 0 ? -1 : real(fd, data, size); }
int fsync(int fd) { REAL(fsync); return strike_fd(FSYNC, fd, NULL, 0) >= 0 ? -1 : real(fd); }
int rename(const char *from, const char *to) { REAL(rename); return strikes(RENAME, AT_FDCWD, to) ? -1 : real(from, to); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); return strikes(RENAME, b, to) ? -1 : real(a, from, b, to); }
int link(const char *from, const char *to) { REAL(link); return strikes(RENAME, AT_FDCWD, to) ? -1 : real(from, to); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return strikes(MKDIR, AT_FDCWD, path) ? -1 : real(path, mode); }
int unlink(const char *path) { REAL(unlink); return strikes(UNLINK, AT_FDCWD, path) ? -1 : real(path); }
int unlinkat(int folder, const char *path, int flags) { REAL(unlinkat); return strikes(UNLINK, folder, path) ? -1 : real(folder, path, flags); }
int flock(int fd, int how) {
    REAL(flock);
    if (board && board->no_flock) { errno = ENOSYS; return -1; }
    return strike_fd(FLOCK, fd, NULL, 0) >= 0 ? -1 : real(fd, how);
}
int connect(int fd, const struct sockaddr *to, socklen_t size) {
    REAL(connect);
    return to->sa_family != AF_UNIX && wants(CONNECT) && strike(CONNECT, NULL, NULL, 0) >= 0 ? -1 : real(fd, to, size);
}
int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    REAL(getaddrinfo);
    return wants(LOOKUP) && strike(LOOKUP, NULL, NULL, 0) >= 0 ? EAI_AGAIN : real(name, service, hints, found);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (!result && board && board->clock_ns && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t all = now->tv_sec * 1000000000LL + now->tv_nsec + board->clock_ns;
        now->tv_sec = all / 1000000000LL;
        now->tv_nsec = all % 1000000000LL;
    }
    return result;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
