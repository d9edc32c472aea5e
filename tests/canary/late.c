/* A canary: an engine that answers a command before the change is in the file.
 *
 * In place of renameat(), by which a state file gets its content: each call is done at the next
 * one. What was acknowledged last is lost when the engine is killed.
 */
#include <stdio.h>
#include <string.h>

enum {
    NAME_BYTES_MAX = 64,
};

int __real_renameat(int from_fd, const char *from, int to_fd, const char *to);
int __wrap_renameat(int from_fd, const char *from, int to_fd, const char *to);

int __wrap_renameat(int from_fd, const char *from, int to_fd, const char *to)
{
    static char held[NAME_BYTES_MAX], held_from[NAME_BYTES_MAX];
    char aside[NAME_BYTES_MAX];

    if (held[0] != '\0' && __real_renameat(from_fd, held_from, to_fd, held) < 0)
        return -1;
    snprintf(aside, sizeof(aside), "%s.late", from);
    snprintf(held_from, sizeof(held_from), "%s", aside);
    snprintf(held, sizeof(held), "%s", to);
    return __real_renameat(from_fd, from, to_fd, aside);
}
