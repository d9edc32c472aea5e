#include "failure.h"

#include <stdarg.h>
#include <stdio.h>

static char text[256];

int failure(const char *format, ...)
{
    va_list arguments;

    if (text[0] == '\0') {
        va_start(arguments, format);
        vsnprintf(text, sizeof(text), format, arguments);
        va_end(arguments);
    }
    return -1;
}

const char *failure_text(void)
{
    return text[0] == '\0' ? NULL : text;
}
