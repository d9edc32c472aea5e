/*
 * The one error rule of the workload: what goes wrong is said once, where it is found, and -1 is
 * returned and forwarded unchanged. The first failure stays: what fails after it is a consequence.
 */
#pragma once

#include <stdbool.h>

/* Record a failure in one line, unless there is one already; returns -1. */
int failure(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The failure's line, or NULL when nothing failed. */
const char *failure_text(void);
