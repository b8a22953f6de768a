/* Asks whoever listens on a Unix socket, as Nix asks a daemon: one request of one text, its answer, the next.
 *
 * usage: asker SOCKET OPERATION LIST ROUNDS
 *
 * OPERATION is its number in Nix's worker protocol, 1 (IsValidPath) or 26 (QueryPathInfo); LIST holds store
 * paths, one a line, which are asked for one after the other, so many rounds. Prints requests, how many were
 * answered with yes, and microseconds for each, of all that were asked. Any error ends it with status 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MINOR 37
#define BUFFER (32 << 10) /* as Nix reads */

static char buffer[BUFFER];
static size_t at, end;
static int peer;

static void fail(const char *what) {
    fprintf(stderr, "asker: %s: %s\n", what, errno ? strerror(errno) : "not what a daemon of Nix says");
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void take(void *into, size_t size) {
    char *to = into;
    while (size) {
        if (at == end) {
            ssize_t got = read(peer, buffer, BUFFER);
            if (got <= 0)
                fail("read");
            at = 0;
            end = (size_t)got;
        }
        size_t some = end - at < size ? end - at : size;
        if (to) {
            memcpy(to, buffer + at, some);
            to += some;
        }
        at += some;
        size -= some;
    }
}

static uint64_t number(void) {
    uint64_t value;
    take(&value, 8);
    return value;
}

static void skip_text(void) {
    uint64_t size = number();
    take(NULL, (size + 7) / 8 * 8);
}

static void skip_texts(void) {
    for (uint64_t count = number(); count; count--)
        skip_text();
}

static void give(const void *from, size_t size) {
    if (write(peer, from, size) != (ssize_t)size)
        fail("write");
}

/* Until the answer begins. What a daemon logs meanwhile is no part of these answers. */
static void await_last(void) {
    uint64_t kind = number();
    errno = 0;
    if (kind != 0x616c7473)
        fail("answer");
}

static void greet(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    uint64_t hello[2] = {0x6e697863, 1 << 8 | MINOR}, more[2] = {0, 0};
    if (strlen(path) >= sizeof address.sun_path)
        fail(path);
    strcpy(address.sun_path, path);
    peer = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (peer < 0 || connect(peer, (struct sockaddr *)&address, sizeof address))
        fail(path);
    give(hello, sizeof hello);
    errno = 0;
    if (number() != 0x6478696f)
        fail("greeting");
    if ((number() & 255) < MINOR)
        fail("a daemon of before Nix 2.20");
    give(more, sizeof more); /* no CPU, no reserve */
    skip_text();             /* its version */
    number();                /* whether it trusts us */
    await_last();
}

static int ask(int operation, const char *request, size_t size) {
    give(request, size);
    await_last();
    int yes = number() == 1;
    if (yes && operation == 26) {
        skip_text();  /* deriver */
        skip_text();  /* NAR hash */
        skip_texts(); /* references */
        take(NULL, 24);
        skip_texts(); /* signatures */
        skip_text();  /* content address */
    }
    return yes;
}

int main(int argc, char **argv) {
    if (argc != 5)
        return fputs("usage: asker SOCKET OPERATION LIST ROUNDS\n", stderr), 1;
    int operation = atoi(argv[2]);
    FILE *list = fopen(argv[3], "r");
    if (!list)
        fail(argv[3]);
    char *line = NULL;
    size_t room = 0, count = 0;
    char **requests = NULL;
    size_t *sizes = NULL;
    for (ssize_t length; (length = getline(&line, &room, list)) > 0; count++) {
        length -= line[length - 1] == '\n';
        requests = realloc(requests, (count + 1) * sizeof *requests);
        sizes = realloc(sizes, (count + 1) * sizeof *sizes);
        sizes[count] = 16 + ((size_t)length + 7) / 8 * 8;
        if (!requests || !sizes || !(requests[count] = calloc(1, sizes[count])))
            fail("memory");
        uint64_t head[2] = {(uint64_t)operation, (uint64_t)length};
        memcpy(requests[count], head, 16);
        memcpy(requests[count] + 16, line, (size_t)length);
    }
    greet(argv[1]);
    long asked = 0, yes = 0;
    double began = now();
    for (long round = atol(argv[4]); round > 0; round--)
        for (size_t i = 0; i < count; i++, asked++)
            yes += ask(operation, requests[i], sizes[i]);
    double seconds = now() - began;
    printf("%ld %ld %.3f\n", asked, yes, asked ? seconds / (double)asked * 1e6 : 0.0);
    return 0;
}
