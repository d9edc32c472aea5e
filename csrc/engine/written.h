/* How much of an allocation has been written, where somebody knows.
 *
 * libtpms marshals its state into room for the largest there could be. Overwriting that when it is
 * freed would otherwise mean to read all of it at each commit, 271 KB with version 0.9, to find the
 * pages that never were written.
 */
#pragma once

#include <stddef.h>

/* This thread, which is to free it, has written to no more of `memory` than its first bytes. */
void written_note(const void *memory, size_t n_bytes);

/* How much of an allocation of `n_bytes` may have been written. What was noted of it is forgotten.
 */
size_t written_take(const void *memory, size_t n_bytes);
