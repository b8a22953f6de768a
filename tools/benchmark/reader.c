/* One reader for all file systems: walk, stat or read what a list names, with one or several processes.
 *
 * usage: reader walk|stat|read READERS BASE LIST
 *
 * LIST holds paths relative to BASE, one a line. `walk` lists each and all below it and stats every entry, `stat`
 * stats each, `read` opens each and reads it to its end in pieces of 1 MiB. `walk` deals the paths out in turn;
 * the others give each process a part of the list of its own. Prints entries, bytes and seconds, from a common
 * start until the last process is done. Any error ends it with status 1: a figure for half the work is no figure.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PIECE (1 << 20)

struct count {
    long entries;
    long bytes;
    double ended;
};

static void fail(const char *what) {
    fprintf(stderr, "reader: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void walk(int parent, const char *name, struct count *count) {
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *listing = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;
    struct stat info;
    if (!listing)
        fail(name);
    while (errno = 0, (entry = readdir(listing))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (fstatat(fd, entry->d_name, &info, AT_SYMLINK_NOFOLLOW))
            fail(entry->d_name);
        count->entries++;
        count->bytes += info.st_size;
        if (S_ISDIR(info.st_mode))
            walk(fd, entry->d_name, count);
    }
    if (errno)
        fail(name);
    closedir(listing);
}

static void look(const char *path, struct count *count) {
    struct stat info;
    if (lstat(path, &info))
        fail(path);
    count->entries++;
    count->bytes += info.st_size;
}

static void take(const char *path, struct count *count) {
    static char piece[PIECE];
    ssize_t got;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        fail(path);
    while ((got = read(fd, piece, PIECE)) > 0)
        count->bytes += got;
    if (got < 0)
        fail(path);
    close(fd);
    count->entries++;
}

int main(int argc, char **argv) {
    char **paths = NULL, *line = NULL, start;
    size_t room = 0, filled = 0, size = 0;
    ssize_t length;
    int readers = argc == 5 ? atoi(argv[2]) : 0, gate[2], status;
    FILE *list;
    struct count *counts, all = {0, 0, 0};
    double began;

    if (readers < 1) {
        fputs("usage: reader walk|stat|read READERS BASE LIST\n", stderr);
        return 2;
    }
    if (!(list = fopen(argv[4], "r")))
        fail(argv[4]);
    while ((length = getline(&line, &size, list)) > 0) {
        if (line[length - 1] == '\n')
            line[length - 1] = 0;
        if (filled == room && !(paths = realloc(paths, (room = 2 * room + 1024) * sizeof *paths)))
            fail("memory");
        if (!(paths[filled++] = strdup(line)))
            fail("memory");
    }
    if (chdir(argv[3]))
        fail(argv[3]);
    counts = mmap(NULL, (size_t)readers * sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (counts == MAP_FAILED || pipe(gate))
        fail("memory");

    for (int i = 0; i < readers; i++) {
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (child)
            continue;
        close(gate[1]);
        if (read(gate[0], &start, 1)) /* its end: all were started */
            fail("start");
        if (!strcmp(argv[1], "walk")) {
            for (size_t at = (size_t)i; at < filled; at += (size_t)readers)
                walk(AT_FDCWD, paths[at], counts + i);
        } else {
            size_t at = filled * (size_t)i / (size_t)readers;
            for (size_t end = filled * (size_t)(i + 1) / (size_t)readers; at < end; at++)
                (*argv[1] == 's' ? look : take)(paths[at], counts + i);
        }
        counts[i].ended = now();
        _exit(0);
    }
    began = now();
    close(gate[0]);
    close(gate[1]);
    for (int i = 0; i < readers; i++)
        if (wait(&status) < 0 || status)
            return 1;
    for (int i = 0; i < readers; i++) {
        all.entries += counts[i].entries;
        all.bytes += counts[i].bytes;
        if (counts[i].ended > all.ended)
            all.ended = counts[i].ended;
    }
    printf("%ld %ld %.6f\n", all.entries, all.bytes, all.ended - began);
    return 0;
}
