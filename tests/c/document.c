#include "document.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum {
    LINE_BYTES_MAX = 400,
};

const char *document_find_row(const char *path, const char *name)
{
    static char line[LINE_BYTES_MAX];
    char start[LINE_BYTES_MAX];
    bool found = false;

    snprintf(start, sizeof(start), "| %s | ", name);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    while (!found && fgets(line, sizeof(line), file))
        found = strncmp(line, start, strlen(start)) == 0;
    fclose(file);
    if (!found)
        fail_msg("%s has no row for %s", path, name);
    return line + strlen(start);
}

const char *document_read_cell(const char *cell, char *out, size_t n_letters)
{
    size_t n = 0;

    for (; *cell != '|'; cell++) {
        assert_true(*cell);
        if (*cell != ' ' && *cell != '`') {
            assert_true(n < n_letters);
            out[n++] = *cell;
        }
    }
    assert_int_equal(n, n_letters);
    out[n] = 0;
    return cell + 1;
}
