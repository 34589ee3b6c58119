/* Loaded before libc: from an armed call on, writes to files under a folder fail with EIO, once or each time. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096];
static long calls, first, lasting;

/* Count calls on files below `where`; the one numbered `at` (0: none) fails, with `always` all later ones too. */
void arm(const char *where, long at, long always) {
    snprintf(folder, sizeof folder, "%s", where);
    calls = 0, first = at, lasting = always;
}

long counted(void) { return calls; }

static int broken(const char *path) {
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
    long call = __sync_add_and_fetch(&calls, 1);
    if (!first || call < first || (call > first && !lasting)) return 0;
    errno = EIO;
    return 1;
}

static int broken_file(int file) {
    char link[32], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = folder[0] ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    return broken(path);
}

#define CALL(type, name, parameters, arguments, test)                           \
    type name parameters {                                                      \
        static type(*real) parameters;                                          \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);          \
        return (test) ? -1 : real arguments;                                    \
    }
CALL(ssize_t, write, (int file, const void *data, size_t n), (file, data, n), broken_file(file))
CALL(int, fsync, (int file), (file), broken_file(file))
CALL(int, rename, (const char *from, const char *to), (from, to), broken(to))
CALL(int, unlink, (const char *path), (path), broken(path))
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), broken(path))
