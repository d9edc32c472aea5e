/* Errors: how functions of the core return them, and how a person gets to read them.
 *
 * A negative return is a negative errno: the operation failed, nothing has changed, and the caller
 * forwards it unchanged. A positive return is part of a function's contract, listed in an enum
 * beside its prototype. 0 is success.
 */
#pragma once

/* Give the name that lines begin with, which has to stay. At first it is "vtpmd-engine". */
void error_set_program(const char *name);

/* Have lines written to another descriptor than standard error, until another one is given. */
void error_set_descriptor(int fd);

/* Write one line to standard error, with the program's name before it. Never give it state, a
 * command's bytes, or anything else that may hold a secret. */
void error_report(const char *format, ...) __attribute__((format(printf, 1, 2)));
