#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

enum {
    LINE_BYTES_MAX = 512, /* written with one call, so that lines of two processes never mix */
};

void error_report(const char *format, ...)
{
    char line[LINE_BYTES_MAX];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    dprintf(STDERR_FILENO, "vtpmd-engine: %s\n", line);
}
