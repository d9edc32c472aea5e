/* Messages of the engine link: a header and a payload, from a socket or from the boot record. */
#pragma once

#include <stdint.h>
#include <sys/types.h>

#include "link_types.h"

enum {
    MESSAGE_END = 1, /* of the connection, or of the record, and between two messages */
};

struct message {
    struct link_header header;
    uint8_t *payload; /* on the heap, or NULL */
    int descriptor;   /* or -1 */
};

#define MESSAGE_NONE ((struct message){.descriptor = -1})

/* Overwrite and free the payload, and close the descriptor. */
void message_deinit(struct message *message);

/* Read the next message into one that is MESSAGE_NONE. Returns 0, MESSAGE_END, or a negative errno
 * if what comes cannot be one. From a socket, which does not block, it has to come whole by a
 * deadline (clock.h): -ETIMEDOUT. From a record it is read where `at` says, which then says where
 * the next one is. */
int message_receive(int fd, struct message *message, int64_t deadline_ms);
int message_read(int fd, struct message *message);
int message_read_at(int fd, off_t *at, struct message *message);

/* Send a message on a socket that does not block, by a deadline; one that has passed is to wait for
 * nothing. Returns 0 or a negative errno: half of it may have been sent then. */
int message_send(int fd, const struct message *message, int64_t deadline_ms);
