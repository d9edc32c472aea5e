/* The control channel's server: one client at a time, the others wait in the socket's backlog.
 *
 * Bytes and descriptors are moved here, over poll(); control.h makes requests of them, commands.h
 * carries them out. Nothing that a client does, or leaves undone, holds the server for longer than
 * the limits below, and nothing the end of the process.
 */
#pragma once

#include <stdbool.h>

#include "commands.h"
#include "link_types.h"

struct server;

enum {
    SERVER_COMMAND_TIMEOUT_MS = 500,  /* for the rest of a command, as swtpm gives it */
    SERVER_ANSWER_TIMEOUT_MS = 5000,  /* for the client to read; QEMU does so at once */
    SERVER_READ_BYTES_MAX = 64 << 10, /* with one call */
};

/* Serve a socket that listens, for commands that are about `about`. `wake_fd` is readable once it
 * is to end. Returns 0 or a negative errno. */
int server_new(struct server **server, const struct commands *about, int listening_fd, int wake_fd);

/* Serve no listening socket but one client, on it; or nobody. */
void server_set_control(struct server *server, enum link_control control);

/* End once a client has gone. */
void server_end_with_client(struct server *server);

void server_free(struct server *server);

/* Write a line for each command to standard error. */
void server_set_verbose(struct server *server, bool is_so);

/* Serve until a SHUTDOWN is answered, or it is to end: a command that is carried out is answered
 * first. */
void server_run(struct server *server);

/* What its commands are about. */
struct commands *server_commands(struct server *server);
