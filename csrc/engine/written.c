#include "written.h"

/* Of one allocation: there is never another before that is freed. */
static _Thread_local const void *noted;
static _Thread_local size_t noted_bytes;

void written_note(const void *memory, size_t n_bytes)
{
    noted = memory;
    noted_bytes = n_bytes;
}

size_t written_take(const void *memory, size_t n_bytes)
{
    if (memory != noted)
        return n_bytes;
    noted = NULL;
    return noted_bytes < n_bytes ? noted_bytes : n_bytes;
}
