#include "error.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

enum {
    LINE_BYTES_MAX = 512, /* written with one call, so that lines of two processes never mix */
};

static const char *program = "vtpmd-engine";
static atomic_int descriptor = STDERR_FILENO;

void error_set_program(const char *name)
{
    program = name;
}

void error_set_descriptor(int fd)
{
    descriptor = fd;
}

/* sandbox: write */
void error_report(const char *format, ...)
{
    char line[LINE_BYTES_MAX];
    int n_bytes = snprintf(line, sizeof(line), "%s: ", program);
    va_list arguments;

    va_start(arguments, format);
    n_bytes += vsnprintf(line + n_bytes, sizeof(line) - (size_t)n_bytes, format, arguments);
    va_end(arguments);
    if (n_bytes > LINE_BYTES_MAX - 1)
        n_bytes = LINE_BYTES_MAX - 1;
    line[n_bytes++] = '\n'; /* in place of the terminator */
    if (write(descriptor, line, (size_t)n_bytes) < 0)
        return; /* there is nobody left to tell */
}
