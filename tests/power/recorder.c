/* Preloaded into a process: records, counts and fails what it does to files below one folder.
 *
 * Every call that changes something there, every sync, and every write to standard output is done and logged
 * under one lock, so that the log has the order of all processes and threads. At a chosen call the process
 * kills itself (before it, or in the middle of its bytes), or from a chosen call on the disk is full.
 * Calls go to the kernel directly; what goes past these names (memory maps, the C library's own streams) is
 * not seen: the test that replays a log compares the outcome with the folder.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define SECTOR 512
#define EXPORT __attribute__((visibility("default")))
enum { MARK = 1, OUT, CREATE, WRITE, SIZE, SYNC, MKDIR, RENAME, LINK, UNLINK, RMDIR, UNKNOWN, HOLE };

struct head {
    uint32_t op, pid;
    uint64_t inode;
    int64_t offset;
    uint32_t durable, first, second, pad;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int log_fd = -1;
static long count, kill_at, full_at;
static int tear, full_mode;

/* root: the folder; log: a file, or empty. kill_at, full_at: numbers of calls, 0 for none. tear: half of the
 * sectors of that call are still written. full_mode: 1 files cannot grow, 2 nothing can be written or synced. */
EXPORT void power_configure(const char *folder, const char *log, long kill_number, long full_number, int torn,
                            int mode) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    count = 0;
    kill_at = kill_number;
    full_at = full_number;
    tear = torn;
    full_mode = mode;
    if (log_fd >= 0)
        syscall(SYS_close, log_fd);
    log_fd = -1;
    if (*log) {
        int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        log_fd = syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 700); /* out of the way of closed descriptors */
        syscall(SYS_close, fd);
    }
}

EXPORT long power_count(void) { return count; }

__attribute__((constructor)) static void begin(void) {
    const char *folder = getenv("POWER_ROOT"), *log = getenv("POWER_LOG"), *at = getenv("POWER_KILL_AT");
    if (folder)
        power_configure(folder, log ? log : "", at ? atol(at) : 0, 0, 0, 0);
}

static void lock(void) {
    pthread_mutex_lock(&mutex);
    if (log_fd >= 0) {
        struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        while (syscall(SYS_fcntl, log_fd, F_SETLKW, &all) < 0 && errno == EINTR)
            ;
    }
}

static void unlock(void) {
    int saved = errno;
    if (log_fd >= 0) {
        struct flock all = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
        syscall(SYS_fcntl, log_fd, F_SETLK, &all);
    }
    pthread_mutex_unlock(&mutex);
    errno = saved;
}

static void note(int op, uint64_t inode, int64_t offset, int durable, const void *first, size_t first_length,
                 const void *second, size_t second_length) {
    if (log_fd < 0)
        return;
    int saved = errno;
    struct head head = {op, (uint32_t)getpid(), inode, offset, (uint32_t)durable, (uint32_t)first_length,
                        (uint32_t)second_length, 0};
    struct iovec parts[3] = {{&head, sizeof head}, {(void *)first, first_length}, {(void *)second, second_length}};
    syscall(SYS_writev, log_fd, parts, 3);
    errno = saved;
}

EXPORT void power_mark(const char *text) {
    lock();
    note(MARK, 0, 0, 0, text, strlen(text), "", 0);
    unlock();
}

static void die(void) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;)
        pause();
}

/* One more call that counts. Return whether this is where the process ends. */
static int step(void) {
    count++;
    if (kill_at && count == kill_at) {
        if (!tear)
            die();
        return 1;
    }
    return 0;
}

static int full(void) { return full_at && count >= full_at; }

static const char *absolute(int folder, const char *path, char *room) {
    char base[PATH_MAX] = "";
    if (*path == '/')
        return path;
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base))
            return path;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
        if (n < 0)
            return path;
        base[n] = 0;
    }
    if (snprintf(room, PATH_MAX, "%s/%s", base, path) >= PATH_MAX)
        return path;
    return room;
}

static int below(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static const char *inside(const char *path) { return path[root_length] ? path + root_length + 1 : ""; }

static int ours(int fd, char *room) {
    char link[64];
    if (!root_length || fd == log_fd)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, room, PATH_MAX - 1);
    if (n < 0)
        return 0;
    room[n] = 0;
    return below(room);
}

static uint64_t inode_of(int fd) {
    struct stat there;
    return fstat(fd, &there) ? 0 : there.st_ino;
}

/* --- opening */

static int open_it(int folder, const char *path, int flags, mode_t mode) {
    char room[PATH_MAX];
    if (!root_length || !(flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE)
        return syscall(SYS_openat, folder, path, flags, mode);
    const char *whole = absolute(folder, path, room);
    if (!below(whole))
        return syscall(SYS_openat, folder, path, flags, mode);
    lock();
    struct stat before;
    int there = !fstatat(AT_FDCWD, whole, &before, AT_SYMLINK_NOFOLLOW);
    int fd;
    if (there && !((flags & O_TRUNC) && before.st_size)) {
        fd = syscall(SYS_openat, folder, path, flags, mode);
    } else {
        if (step())
            die();
        if (!there && full()) {
            errno = ENOSPC;
            fd = -1;
        } else {
            fd = syscall(SYS_openat, folder, path, flags, mode);
        }
        if (fd >= 0)
            note(there ? SIZE : CREATE, inode_of(fd), 0, 0, inside(whole), strlen(inside(whole)), "", 0);
    }
    unlock();
    return fd;
}

#define MODE_OF(flags, mode)                                                                                      \
    mode_t mode = 0;                                                                                              \
    if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) {                                                  \
        va_list more;                                                                                             \
        va_start(more, flags);                                                                                    \
        mode = va_arg(more, mode_t);                                                                              \
        va_end(more);                                                                                             \
    }
EXPORT int open(const char *path, int flags, ...) {
    MODE_OF(flags, mode)
    return open_it(AT_FDCWD, path, flags, mode);
}
EXPORT int open64(const char *path, int flags, ...) {
    MODE_OF(flags, mode)
    return open_it(AT_FDCWD, path, flags, mode);
}
EXPORT int openat(int folder, const char *path, int flags, ...) {
    MODE_OF(flags, mode)
    return open_it(folder, path, flags, mode);
}
EXPORT int openat64(int folder, const char *path, int flags, ...) {
    MODE_OF(flags, mode)
    return open_it(folder, path, flags, mode);
}
EXPORT int __open_2(const char *path, int flags) { return open_it(AT_FDCWD, path, flags, 0); }
EXPORT int __open64_2(const char *path, int flags) { return open_it(AT_FDCWD, path, flags, 0); }
EXPORT int __openat_2(int folder, const char *path, int flags) { return open_it(folder, path, flags, 0); }
EXPORT int __openat64_2(int folder, const char *path, int flags) { return open_it(folder, path, flags, 0); }
EXPORT int creat(const char *path, mode_t mode) {
    return open_it(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}
EXPORT int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* --- writing */

/* offset -1: at the descriptor's own. */
static ssize_t write_it(int fd, const struct iovec *parts, int number, off_t offset) {
    char path[PATH_MAX];
    int where = ours(fd, path), out = fd == 1 && root_length;
    size_t length = 0;
    if (!where && !out)
        return offset < 0 ? syscall(SYS_writev, fd, parts, number)
                          : syscall(SYS_pwritev, fd, parts, number, offset, 0L);
    for (int i = 0; i < number; i++)
        length += parts[i].iov_len;
    char *data = malloc(length + 1);
    size_t at = 0;
    for (int i = 0; i < number; at += parts[i++].iov_len)
        memcpy(data + at, parts[i].iov_base, parts[i].iov_len);
    lock();
    int last = step(), flags = fcntl(fd, F_GETFL);
    ssize_t done = -1;
    if (out && !where) {
        if (last)
            die();
        done = syscall(SYS_write, fd, data, length);
        note(OUT, 0, 0, 0, "", 0, data, done > 0 ? done : 0);
    } else {
        struct stat there;
        fstat(fd, &there);
        off_t start = offset >= 0 ? offset : flags & O_APPEND ? there.st_size : lseek(fd, 0, SEEK_CUR);
        off_t cut = (start + (off_t)length / 2) / SECTOR * SECTOR; /* never torn within a sector */
        size_t torn = cut > start ? cut - start : 0, wanted = last ? torn : length;
        if (full() && (full_mode == 2 || start + (off_t)length > there.st_size)) {
            wanted = full_mode == 1 && start < there.st_size ? (size_t)(there.st_size - start)
                     : tear && count == full_at              ? torn
                                                             : 0;
            errno = ENOSPC;
        }
        if (wanted || !length)
            done = offset < 0 ? syscall(SYS_write, fd, data, wanted) : syscall(SYS_pwrite64, fd, data, wanted, offset);
        else if (last)
            done = 0;
        if (done > 0)
            note(WRITE, there.st_ino, start, (flags & O_DSYNC) != 0, "", 0, data, done);
        if (last)
            die();
    }
    unlock();
    int saved = errno;
    free(data);
    errno = saved;
    return done;
}

static ssize_t one(int fd, const void *data, size_t length, off_t offset) {
    struct iovec part = {(void *)data, length};
    return write_it(fd, &part, 1, offset);
}
EXPORT ssize_t write(int fd, const void *data, size_t length) { return one(fd, data, length, -1); }
EXPORT ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return one(fd, data, length, offset); }
EXPORT ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset) { return one(fd, data, length, offset); }
EXPORT ssize_t writev(int fd, const struct iovec *parts, int number) { return write_it(fd, parts, number, -1); }
EXPORT ssize_t pwritev(int fd, const struct iovec *parts, int number, off_t offset) {
    return write_it(fd, parts, number, offset);
}
EXPORT ssize_t pwritev64(int fd, const struct iovec *parts, int number, off_t offset) {
    return write_it(fd, parts, number, offset);
}

/* --- sizes, and what is not replayed */

static int size_it(int fd, off_t size, int grow_only) {
    char path[PATH_MAX];
    if (!ours(fd, path))
        return grow_only ? EBADF : syscall(SYS_ftruncate, fd, size);
    lock();
    struct stat there;
    fstat(fd, &there);
    int result = 0;
    if (step())
        die();
    if (size > there.st_size && full()) {
        errno = ENOSPC;
        result = -1;
    } else if (!grow_only || size > there.st_size) {
        result = syscall(SYS_ftruncate, fd, size);
    }
    if (!result)
        note(SIZE, there.st_ino, grow_only && size < there.st_size ? there.st_size : size, 0, "", 0, "", 0);
    unlock();
    return result;
}
EXPORT int ftruncate(int fd, off_t size) { return size_it(fd, size, 0); }
EXPORT int ftruncate64(int fd, off_t size) { return size_it(fd, size, 0); }
static int truncate_it(const char *path, off_t size) {
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int result = size_it(fd, size, 0), saved = errno;
    syscall(SYS_close, fd);
    errno = saved;
    return result;
}
EXPORT int truncate(const char *path, off_t size) { return truncate_it(path, size); }
EXPORT int truncate64(const char *path, off_t size) { return truncate_it(path, size); }

static int allocate(int fd, int mode, off_t offset, off_t length) {
    char path[PATH_MAX];
    if (!ours(fd, path))
        return syscall(SYS_fallocate, fd, mode, offset, length);
    if (mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)) {
        int64_t size = length;
        lock();
        if (step())
            die();
        int punched = syscall(SYS_fallocate, fd, mode, offset, length);
        if (!punched)
            note(HOLE, inode_of(fd), offset, 0, "", 0, &size, sizeof size);
        unlock();
        return punched;
    }
    if (mode) {
        note(UNKNOWN, 0, 0, 0, "fallocate", 9, "", 0);
        return syscall(SYS_fallocate, fd, mode, offset, length);
    }
    struct stat there;
    fstat(fd, &there);
    if (full() && offset + length <= there.st_size)
        return 0;
    int result = size_it(fd, offset + length, 1);
    return result ? result : (int)syscall(SYS_fallocate, fd, 0, offset, length);
}
EXPORT int fallocate(int fd, int mode, off_t offset, off_t length) { return allocate(fd, mode, offset, length); }
EXPORT int fallocate64(int fd, int mode, off_t offset, off_t length) { return allocate(fd, mode, offset, length); }
EXPORT int posix_fallocate(int fd, off_t offset, off_t length) {
    return allocate(fd, 0, offset, length) ? errno : 0;
}
EXPORT int posix_fallocate64(int fd, off_t offset, off_t length) {
    return allocate(fd, 0, offset, length) ? errno : 0;
}

EXPORT void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset) {
    char path[PATH_MAX];
    if (fd >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE) && ours(fd, path) &&
        !strstr(path, "lock.mdb")) {
        lock();
        note(UNKNOWN, 0, 0, 0, "mmap", 4, path, strlen(path));
        unlock();
    }
    return (void *)syscall(SYS_mmap, at, length, protection, flags, fd, offset);
}
EXPORT void *mmap64(void *at, size_t length, int protection, int flags, int fd, off_t offset) {
    return mmap(at, length, protection, flags, fd, offset);
}

static ssize_t copied(int fd, ssize_t result, const char *what) {
    char path[PATH_MAX];
    if (ours(fd, path)) {
        lock();
        note(UNKNOWN, 0, 0, 0, what, strlen(what), path, strlen(path));
        unlock();
    }
    return result;
}
EXPORT ssize_t copy_file_range(int from, off64_t *in, int to, off64_t *out, size_t length, unsigned flags) {
    return copied(to, syscall(SYS_copy_file_range, from, in, to, out, length, flags), "copy_file_range");
}
EXPORT ssize_t sendfile(int to, int from, off_t *offset, size_t length) {
    return copied(to, syscall(SYS_sendfile, to, from, offset, length), "sendfile");
}
EXPORT ssize_t sendfile64(int to, int from, off64_t *offset, size_t length) {
    return copied(to, syscall(SYS_sendfile, to, from, offset, length), "sendfile");
}

/* --- syncs */

static int sync_it(int fd, long number) {
    char path[PATH_MAX];
    if (!ours(fd, path))
        return syscall(number, fd);
    lock();
    if (step())
        die();
    int result = -1;
    if (full() && full_mode == 2) {
        errno = ENOSPC;
    } else {
        result = syscall(number, fd);
        if (!result)
            note(SYNC, inode_of(fd), 0, 0, inside(path), strlen(inside(path)), "", 0);
    }
    unlock();
    return result;
}
EXPORT int fsync(int fd) { return sync_it(fd, SYS_fsync); }
EXPORT int fdatasync(int fd) { return sync_it(fd, SYS_fdatasync); }

/* --- names */

static int named(int op, int folder, const char *path, mode_t mode) {
    char room[PATH_MAX];
    const char *whole = absolute(folder, path, room);
    int is_ours = below(whole), result;
    if (is_ours) {
        struct stat there;
        int present = !fstatat(AT_FDCWD, whole, &there, AT_SYMLINK_NOFOLLOW);
        if (present == (op == MKDIR)) { /* fails, and changes nothing */
            is_ours = 0;
        } else {
            lock();
            if (step())
                die();
        }
    }
    if (op == MKDIR && is_ours && full()) {
        errno = ENOSPC;
        result = -1;
    } else if (op == MKDIR) {
        result = syscall(SYS_mkdirat, folder, path, mode);
    } else {
        result = syscall(SYS_unlinkat, folder, path, op == RMDIR ? AT_REMOVEDIR : 0);
    }
    if (is_ours) {
        if (!result) {
            struct stat there = {0};
            if (op == MKDIR)
                fstatat(AT_FDCWD, whole, &there, AT_SYMLINK_NOFOLLOW);
            note(op, there.st_ino, 0, 0, inside(whole), strlen(inside(whole)), "", 0);
        }
        unlock();
    }
    return result;
}
EXPORT int mkdir(const char *path, mode_t mode) { return named(MKDIR, AT_FDCWD, path, mode); }
EXPORT int mkdirat(int folder, const char *path, mode_t mode) { return named(MKDIR, folder, path, mode); }
EXPORT int unlink(const char *path) { return named(UNLINK, AT_FDCWD, path, 0); }
EXPORT int rmdir(const char *path) { return named(RMDIR, AT_FDCWD, path, 0); }
EXPORT int unlinkat(int folder, const char *path, int flags) {
    return named(flags & AT_REMOVEDIR ? RMDIR : UNLINK, folder, path, 0);
}

static int two(int op, int from, const char *source, int to, const char *target) {
    char first[PATH_MAX], second[PATH_MAX];
    const char *old = absolute(from, source, first), *new = absolute(to, target, second);
    int is_ours = below(old) && below(new), result;
    if (is_ours) {
        lock();
        if (step())
            die();
    }
    if (op == LINK && is_ours && full()) {
        errno = ENOSPC;
        result = -1;
    } else if (op == LINK) {
        result = syscall(SYS_linkat, from, source, to, target, 0);
    } else {
        result = syscall(SYS_renameat2, from, source, to, target, 0);
    }
    if (is_ours) {
        if (!result)
            note(op, 0, 0, 0, inside(old), strlen(inside(old)), inside(new), strlen(inside(new)));
        unlock();
    }
    return result;
}
EXPORT int rename(const char *source, const char *target) { return two(RENAME, AT_FDCWD, source, AT_FDCWD, target); }
EXPORT int renameat(int from, const char *source, int to, const char *target) {
    return two(RENAME, from, source, to, target);
}
EXPORT int link(const char *source, const char *target) { return two(LINK, AT_FDCWD, source, AT_FDCWD, target); }
EXPORT int linkat(int from, const char *source, int to, const char *target, int flags) {
    return flags ? (int)syscall(SYS_linkat, from, source, to, target, flags) : two(LINK, from, source, to, target);
}
