/* Write many small files at a pace, and note when each was closed.
 *
 * writer ROOT DIRECTORIES FILES PER_SECOND BYTES LOG
 *
 * Files go round the directories ROOT/d000 ... , which must exist. PER_SECOND 0
 * is full speed. LOG receives one 64-bit CLOCK_MONOTONIC nanosecond per file,
 * in order. Prints the seconds it took.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

int main(int argc, char **argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: writer ROOT DIRECTORIES FILES PER_SECOND BYTES LOG\n");
        return 2;
    }
    long directories = atol(argv[2]), files = atol(argv[3]), bytes = atol(argv[5]);
    double per_second = atof(argv[4]);
    char *block = malloc(bytes + 1);
    int64_t *closed = malloc(sizeof(int64_t) * files);
    if (!block || !closed)
        die("malloc");
    memset(block, 'x', bytes);
    if (chdir(argv[1]))
        die(argv[1]);

    int64_t start = now_ns();
    for (long i = 0; i < files; i++) {
        if (per_second > 0) {
            int64_t due = start + (int64_t)(i * 1e9 / per_second);
            struct timespec t = {due / 1000000000, due % 1000000000};
            if (due > now_ns())
                clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
        }
        char name[64];
        snprintf(name, sizeof name, "d%03ld/f%07ld.tif", i % directories, i);
        int fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
        if (fd < 0)
            die(name);
        if (write(fd, block, bytes) != bytes)
            die(name);
        close(fd);
        closed[i] = now_ns();
    }
    double elapsed = (now_ns() - start) / 1e9;

    int log = open(argv[6], O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (log < 0)
        die(argv[6]);
    size_t left = sizeof(int64_t) * files;
    for (char *p = (char *)closed; left;) {
        ssize_t n = write(log, p, left);
        if (n <= 0)
            die(argv[6]);
        p += n;
        left -= n;
    }
    printf("%.6f\n", elapsed);
    return 0;
}
