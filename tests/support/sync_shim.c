/* Preloaded into a program: what fsync and fdatasync do is read, at each call, from the file named by TEST_SYNC_FILE:
 * "eio" fails, a number of milliseconds is waited for first, anything else changes nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int disturbed(void) {
    char order[32] = {0};
    const char *path = getenv("TEST_SYNC_FILE");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return 0;
    ssize_t length = read(fd, order, sizeof order - 1);
    close(fd);
    if (length > 0 && strncmp(order, "eio", 3) == 0) {
        errno = EIO;
        return 1;
    }
    long wait_ms = atol(order);
    struct timespec wait = {wait_ms / 1000, (wait_ms % 1000) * 1000000L};
    if (wait_ms > 0)
        nanosleep(&wait, NULL);
    return 0;
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return disturbed() ? -1 : real(fd);
}

int fdatasync(int fd) {
    static int (*real)(int);
    if (!real)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return disturbed() ? -1 : real(fd);
}
