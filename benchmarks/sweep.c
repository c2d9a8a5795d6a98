/* The least a full sweep must do: list each directory of ROOT and fstatat what is in it. Prints seconds,
 * seconds of CPU, and files. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static long files;

static void sweep(int at, const char *path) {
    int descriptor = openat(at, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *directory = descriptor < 0 ? NULL : fdopendir(descriptor);
    if (!directory) {
        perror(path);
        exit(1);
    }
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (entry->d_type == DT_DIR)
            sweep(descriptor, entry->d_name);
        else {
            struct stat seen;
            if (!fstatat(descriptor, entry->d_name, &seen, AT_SYMLINK_NOFOLLOW) && S_ISREG(seen.st_mode))
                files++;
        }
    }
    closedir(directory);
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: sweep ROOT\n");
        return 2;
    }
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    sweep(AT_FDCWD, argv[1]);
    clock_gettime(CLOCK_MONOTONIC, &b);
    struct timespec cpu;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
    printf("%.6f %.6f %ld\n", (b.tv_sec - a.tv_sec) + (b.tv_nsec - a.tv_nsec) / 1e9, cpu.tv_sec + cpu.tv_nsec / 1e9,
           files);
    return 0;
}
