/* The clocks of a process, moved while it runs: for LD_PRELOAD in tests.
 *
 * FAKE_CLOCK names a file of two 64-bit numbers, seconds that are added to the wall clock and to the time since boot
 * (which counts a sleeping machine); it is mapped, so that a write to it takes effect at once.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long long *offsets;

__attribute__((constructor)) static void map_offsets(void) {
    const char *path = getenv("FAKE_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *found = mmap(NULL, 2 * sizeof *offsets, PROT_READ, MAP_SHARED, fd, 0);
    if (found != MAP_FAILED) offsets = found;
    close(fd);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int code = (int)syscall(SYS_clock_gettime, clock, now);
    if (code == 0 && offsets && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offsets[0];
    if (code == 0 && offsets && clock == CLOCK_BOOTTIME) now->tv_sec += offsets[1];
    return code;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *out, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
