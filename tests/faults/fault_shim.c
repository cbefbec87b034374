/* Sees every file-system call of its process, counts those below one folder, and spoils the N-th.
 *
 * A seccomp filter turns the calls into SIGSYS; the handler does them itself, from this library, which the filter lets
 * pass. Unlike LD_PRELOAD this also sees calls that bypass the C library (Rust's rustix) or happen inside it (fopen).
 * The filter asks where a call comes from: only from code that was mapped when it was installed. A program that is
 * started later by exec has other addresses and is left alone. Linux on x86-64 only. Used by fault_server.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>

#ifndef __x86_64__
#error "written for x86-64"
#endif
#ifndef SYS_fchmodat2
#define SYS_fchmodat2 452
#endif

enum action { COUNT, KILL_BEFORE, KILL_AFTER, FAIL, SHORT };
enum shape { PATH, AT, PATH_PATH, AT_AT, FD, FD_FD, PATH_SECOND, AT_SECOND, MAP };
enum need { NOTHING = 0, SPACE = 1, WRITABLE = 2, DESCRIPTOR = 4, PERMISSION = 8, OPENS = 16, READS = 32 };

struct call {
    long number;
    const char *name;
    enum shape shape;
    int needs;
};

/* What a call needs says which errors it can meet in earnest: ENOSPC where it takes space, EMFILE where it opens ... */
static const struct call CALLS[] = {
    {SYS_open, "open", PATH, OPENS | DESCRIPTOR | PERMISSION},
    {SYS_openat, "openat", AT, OPENS | DESCRIPTOR | PERMISSION},
    {SYS_openat2, "openat2", AT, OPENS | DESCRIPTOR | PERMISSION},
    {SYS_creat, "creat", PATH, SPACE | WRITABLE | DESCRIPTOR | PERMISSION},
    {SYS_write, "write", FD, SPACE},
    {SYS_pwrite64, "pwrite64", FD, SPACE},
    {SYS_writev, "writev", FD, SPACE},
    {SYS_pwritev, "pwritev", FD, SPACE},
    {SYS_pwritev2, "pwritev2", FD, SPACE},
    {SYS_copy_file_range, "copy_file_range", FD_FD, SPACE},
    {SYS_sendfile, "sendfile", FD, SPACE},
    {SYS_fsync, "fsync", FD, SPACE},
    {SYS_fdatasync, "fdatasync", FD, SPACE},
    {SYS_sync_file_range, "sync_file_range", FD, SPACE},
    {SYS_syncfs, "syncfs", FD, SPACE},
    {SYS_rename, "rename", PATH_PATH, SPACE | WRITABLE | PERMISSION},
    {SYS_renameat, "renameat", AT_AT, SPACE | WRITABLE | PERMISSION},
    {SYS_renameat2, "renameat2", AT_AT, SPACE | WRITABLE | PERMISSION},
    {SYS_mkdir, "mkdir", PATH, SPACE | WRITABLE | PERMISSION},
    {SYS_mkdirat, "mkdirat", AT, SPACE | WRITABLE | PERMISSION},
    {SYS_unlink, "unlink", PATH, WRITABLE | PERMISSION},
    {SYS_unlinkat, "unlinkat", AT, WRITABLE | PERMISSION},
    {SYS_rmdir, "rmdir", PATH, WRITABLE | PERMISSION},
    {SYS_truncate, "truncate", PATH, SPACE | WRITABLE | PERMISSION},
    {SYS_ftruncate, "ftruncate", FD, SPACE},
    {SYS_fallocate, "fallocate", FD, SPACE},
    {SYS_chmod, "chmod", PATH, WRITABLE | PERMISSION},
    {SYS_fchmod, "fchmod", FD, WRITABLE | PERMISSION},
    {SYS_fchmodat, "fchmodat", AT, WRITABLE | PERMISSION},
    {SYS_fchmodat2, "fchmodat2", AT, WRITABLE | PERMISSION},
    {SYS_chown, "chown", PATH, WRITABLE | PERMISSION},
    {SYS_fchown, "fchown", FD, WRITABLE | PERMISSION},
    {SYS_fchownat, "fchownat", AT, WRITABLE | PERMISSION},
    {SYS_utimensat, "utimensat", AT, WRITABLE | PERMISSION},
    {SYS_link, "link", PATH_PATH, SPACE | WRITABLE | PERMISSION},
    {SYS_linkat, "linkat", AT_AT, SPACE | WRITABLE | PERMISSION},
    {SYS_symlink, "symlink", PATH_SECOND, SPACE | WRITABLE | PERMISSION},
    {SYS_symlinkat, "symlinkat", AT_SECOND, SPACE | WRITABLE | PERMISSION},
    {SYS_close, "close", FD, NOTHING},
    {SYS_read, "read", FD, READS},
    {SYS_pread64, "pread64", FD, READS},
    {SYS_readv, "readv", FD, READS},
    {SYS_getdents64, "getdents64", FD, READS},
    {SYS_stat, "stat", PATH, READS | PERMISSION},
    {SYS_lstat, "lstat", PATH, READS | PERMISSION},
    {SYS_fstat, "fstat", FD, READS},
    {SYS_newfstatat, "newfstatat", AT, READS | PERMISSION},
    {SYS_statx, "statx", AT, READS | PERMISSION},
    {SYS_access, "access", PATH, READS | PERMISSION},
    {SYS_faccessat, "faccessat", AT, READS | PERMISSION},
    {SYS_faccessat2, "faccessat2", AT, READS | PERMISSION},
    {SYS_mmap, "mmap", MAP, READS},
};
#define NUM_CALLS (sizeof CALLS / sizeof CALLS[0])

static struct {
    volatile int armed;
    char root[PATH_MAX];
    size_t root_length;
    int action, error, forever, plausible, reads, log;
    long at, count, process;
} fault;

static long raw(long number, long a, long b, long c, long d, long e, long f) {
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static size_t append_number(char *text, size_t length, long number) {
    char digits[24];
    size_t n = 0;
    unsigned long rest = number < 0 ? (unsigned long)-number : (unsigned long)number;
    do
        digits[n++] = (char)('0' + rest % 10);
    while (rest /= 10);
    if (number < 0)
        text[length++] = '-';
    while (n)
        text[length++] = digits[--n];
    return length;
}

static void path_of_descriptor(long descriptor, char *path) {
    char link[48] = "/proc/self/cwd";
    if ((int)descriptor != AT_FDCWD) {
        memcpy(link, "/proc/self/fd/", 15);
        link[append_number(link, 14, (int)descriptor)] = 0;
    }
    long length = raw(SYS_readlink, (long)link, (long)path, PATH_MAX - 1, 0, 0, 0);
    path[length < 0 ? 0 : length] = 0;
}

static int below_root(const char *path) {
    return strncmp(path, fault.root, fault.root_length) == 0 &&
           (path[fault.root_length] == 0 || path[fault.root_length] == '/');
}

/* Writes the absolute path into `full` and tells whether it lies below the root. */
static int names_root(long folder, const char *path, char *full) {
    size_t length = 0;
    full[0] = 0;
    if (path == NULL || path[0] != '/') {
        path_of_descriptor(folder, full);
        length = strlen(full);
        if (path != NULL && path[0] && length + 1 < PATH_MAX)
            full[length++] = '/';
    }
    if (path != NULL) {
        size_t rest = strlen(path);
        if (length + rest >= PATH_MAX)
            return 0;
        memcpy(full + length, path, rest + 1);
    }
    return below_root(full);
}

static int concerns_root(const struct call *call, const long *a, char *path) {
    switch (call->shape) {
    case PATH:
        return names_root(AT_FDCWD, (const char *)a[0], path);
    case AT:
        return names_root(a[0], (const char *)a[1], path);
    case PATH_PATH:
        return names_root(AT_FDCWD, (const char *)a[0], path) || names_root(AT_FDCWD, (const char *)a[1], path);
    case AT_AT:
        return names_root(a[0], (const char *)a[1], path) || names_root(a[2], (const char *)a[3], path);
    case FD_FD:
        return names_root(a[0], NULL, path) || names_root(a[2], NULL, path);
    case PATH_SECOND:
        return names_root(AT_FDCWD, (const char *)a[1], path);
    case AT_SECOND:
        return names_root(a[1], (const char *)a[2], path);
    case MAP:
        return (int)a[4] >= 0 && names_root(a[4], NULL, path);
    default:
        return (int)a[0] >= 0 && names_root(a[0], NULL, path);
    }
}

/* Tells whether the call could meet the error outside a laboratory. */
static int is_plausible(const struct call *call, const long *a) {
    int needs = call->needs;
    if (needs & OPENS) {
        long flags = call->shape == PATH ? a[1] : call->number == SYS_openat2 ? *(const long *)a[2] : a[2];
        if (flags & O_CREAT)
            needs |= SPACE;
        if ((flags & O_ACCMODE) != O_RDONLY)
            needs |= WRITABLE;
    }
    switch (fault.error) {
    case ENOSPC:
    case EDQUOT:
        return needs & SPACE;
    case EROFS:
        return needs & WRITABLE;
    case EACCES:
    case EPERM:
        return needs & PERMISSION;
    case EMFILE:
    case ENFILE:
        return needs & DESCRIPTOR;
    default:
        return 1;
    }
}

static void note(const struct call *call, const char *path, const char *what) {
    char line[PATH_MAX + 128];
    size_t length = 0, name = strlen(call->name), text = strlen(what), place = strlen(path);
    if (fault.log < 0)
        return;
    memcpy(line, what, text), length = text, line[length++] = ' ';
    memcpy(line + length, call->name, name), length += name, line[length++] = ' ';
    memcpy(line + length, path, place), length += place, line[length++] = '\n';
    raw(SYS_write, fault.log, (long)line, (long)length, 0, 0, 0);
}

static void die(void) {
    raw(SYS_kill, raw(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
    for (;;)
        raw(SYS_pause, 0, 0, 0, 0, 0, 0);
}

static long spoil(const struct call *call, long *a) {
    long number = call->number;
    switch (fault.action) {
    case KILL_BEFORE:
        die();
        break;
    case KILL_AFTER:
        raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
        die();
        break;
    case SHORT:
        /* Half of the bytes, as a signal or a nearly full disk makes it; other calls pass. */
        if (number != SYS_write && number != SYS_pwrite64 && number != SYS_read && number != SYS_pread64)
            break;
        if (a[2] > 1)
            return raw(number, a[0], a[1], a[2] / 2, a[3], a[4], a[5]);
        break;
    case FAIL:
        /* A close that reports an error has closed the file all the same. */
        if (number == SYS_close)
            raw(number, a[0], 0, 0, 0, 0, 0);
        return -fault.error;
    }
    return raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static long handle(const struct call *call, long *a) {
    char path[PATH_MAX];
    long number = call->number;
    /* A forked child, on its way to another program, is not counted. */
    if (!fault.armed || raw(SYS_getpid, 0, 0, 0, 0, 0, 0) != fault.process ||
        ((call->needs & READS) && !fault.reads) || !concerns_root(call, a, path) ||
        (fault.plausible && !is_plausible(call, a)))
        return raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    long count = __atomic_add_fetch(&fault.count, 1, __ATOMIC_SEQ_CST);
    if (fault.action != COUNT && (count == fault.at || (fault.forever && count > fault.at))) {
        note(call, path, "!");
        return spoil(call, a);
    }
    note(call, path, "-");
    return raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void on_call(int signal, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    long a[6] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
    (void)signal;
    for (size_t i = 0; i < NUM_CALLS; i++)
        if (CALLS[i].number == info->si_syscall) {
            r[REG_RAX] = handle(&CALLS[i], a);
            return;
        }
    r[REG_RAX] = raw(info->si_syscall, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void put(struct sock_filter *code, size_t *n, struct sock_filter next) { code[(*n)++] = next; }

/* Installs the filter for calls from the `num` address ranges `from`..`to` (none may cross 4 GiB); 0 or an errno. */
int fault_install(const uint64_t *from, const uint64_t *to, size_t num) {
    struct sock_filter *code = calloc(2 * NUM_CALLS + 6 * num + 16, sizeof *code);
    size_t n = 0;
    put(code, &n, (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)));
    put(code, &n, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0));
    put(code, &n, (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    put(code, &n, (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)));
    for (size_t i = 0; i < NUM_CALLS; i++)
        put(code, &n, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)CALLS[i].number,
                                                   (uint8_t)(NUM_CALLS - i), 0));
    put(code, &n, (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    for (size_t i = 0; i < num; i++) {
        uint32_t high = (uint32_t)(from[i] >> 32), first = (uint32_t)from[i], last = (uint32_t)(to[i] - 1);
        size_t ip = offsetof(struct seccomp_data, instruction_pointer);
        put(code, &n, (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)ip + 4));
        put(code, &n, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, high, 0, 4));
        put(code, &n, (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)ip));
        put(code, &n, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, first, 0, 2));
        put(code, &n, (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, last, 1, 0));
        put(code, &n, (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP));
    }
    put(code, &n, (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    struct sock_fprog program = {.len = (unsigned short)n, .filter = code};
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_call;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (sigaction(SIGSYS, &action, NULL))
        return errno;
    if (raw(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0))
        return ENOSYS;
    long result = raw(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, (long)&program, 0, 0, 0);
    return result < 0 ? (int)-result : result > 0 ? EBUSY : 0;
}

/* Counts calls below `root` from now on and spoils the `at`-th (1 is the first); `log` is a descriptor or -1. */
void fault_arm(const char *root, int action, long at, int error, int forever, int plausible, int reads, int log) {
    fault.armed = 0;
    strncpy(fault.root, root, PATH_MAX - 1);
    fault.root_length = strlen(fault.root);
    fault.action = action, fault.at = at, fault.error = error, fault.forever = forever;
    fault.plausible = plausible, fault.reads = reads, fault.log = log;
    fault.count = 0, fault.process = raw(SYS_getpid, 0, 0, 0, 0, 0, 0);
    fault.armed = 1;
}

/* Lets every call pass again and returns how many were counted. */
long fault_disarm(void) {
    fault.armed = 0;
    return fault.count;
}
