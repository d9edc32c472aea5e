/* Tables of docs/ARCHITECTURE.md, as tests of what they say read them. */
#pragma once

#include <stddef.h>

/* Find the row of a table that begins with a cell of this name. Returns what comes after that cell,
 * until the next call. The test fails if there is none. */
const char *document_find_row(const char *path, const char *name);

/* Copy a cell's letters, without what is around them: as many as they are to be. Returns what comes
 * after the cell. The test fails if there are more or fewer. */
const char *document_read_cell(const char *cell, char *out, size_t n_letters);
