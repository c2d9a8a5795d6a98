/* The least that anybody who watches must do: read inotify's events and count them.
 *
 * reader ROOT FILE
 *
 * Watches ROOT and the directories in it. FILE holds three 64-bit numbers that
 * grow: directories watched, files closed after writing, overflows of the queue.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <unistd.h>

static void die(const char *what) {
    perror(what);
    exit(1);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: reader ROOT FILE\n");
        return 2;
    }
    int out = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (out < 0 || ftruncate(out, 3 * sizeof(int64_t)))
        die(argv[2]);
    volatile int64_t *told = mmap(NULL, 3 * sizeof(int64_t), PROT_READ | PROT_WRITE, MAP_SHARED, out, 0);
    int queue = inotify_init1(IN_CLOEXEC);
    uint32_t mask = IN_CREATE | IN_CLOSE_WRITE | IN_MOVED_TO;
    DIR *root = opendir(argv[1]);
    if (told == MAP_FAILED || queue < 0 || !root || chdir(argv[1]))
        die(argv[1]);
    int64_t watched = 0;
    for (struct dirent *entry; (entry = readdir(root));)
        if (entry->d_type == DT_DIR && entry->d_name[0] != '.') {
            if (inotify_add_watch(queue, entry->d_name, mask) < 0)
                die(entry->d_name);
            watched++;
        }
    if (inotify_add_watch(queue, ".", mask) < 0)
        die(argv[1]);
    told[0] = watched + 1;

    static char buffer[256 << 10] __attribute__((aligned(8)));
    for (ssize_t n; (n = read(queue, buffer, sizeof buffer)) > 0;)
        for (char *p = buffer; p < buffer + n;) {
            struct inotify_event *event = (struct inotify_event *)p;
            if (event->mask & IN_CLOSE_WRITE)
                told[1]++;
            else if (event->mask & IN_Q_OVERFLOW)
                told[2]++;
            p += sizeof *event + event->len;
        }
    die("read");
}
