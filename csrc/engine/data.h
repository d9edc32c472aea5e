/* The data channel: the guest's TPM commands, as QEMU writes them.
 *
 * A command is its header (u16 tag, u32 size, u32 code, big-endian) and what follows, `size` bytes
 * in all. As on the control channel the other side waits for the answer before it sends again, so:
 *
 *   - a command may come in pieces; the rest has DATA_REST_TIMEOUT_MS to come,
 *   - what one read brings in excess of a command belongs to it and is dropped,
 *   - a size that no command can have, or a rest that does not come, is answered with
 *     TPM_RC_COMMAND_SIZE (TPM 1.2: TPM_BAD_PARAM_SIZE), and what has come of it is dropped.
 *
 * The guest writes the header, QEMU only passes it on: the size in it is never trusted.
 *
 * A command may come with the prefix of the TCG's simulator (u32 8, u8 locality, u32 size): it is
 * executed in that locality then, and its answer stands between its own size and a zero (u32 each).
 * Not on the socket that QEMU has handed in: there a guest would choose its locality; and not of a
 * TPM 1.2.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct blackout;
struct tpm;
struct data_channel;

enum {
    /* As swtpm gives a message on its control channel. QEMU writes a command with one call. */
    DATA_REST_TIMEOUT_MS = 500,
    /* How long the end waits for who does not read its answer. */
    DATA_ANSWER_TIMEOUT_MS = 500,
};

enum {
    DATA_PREFIX_BYTES = 9,
    DATA_LOCALITY_MAX = 4,
};

enum data_verdict {
    DATA_NEED_MORE = 0,
    DATA_COMMAND = 1,
    DATA_MALFORMED = 2, /* cannot become one */
};

/* A command, by where it is in what was read. */
struct data_command {
    size_t start, n_bytes;
    bool has_prefix;
    uint8_t locality; /* that the prefix says */
};

/* Decide what the first `n_bytes` bytes of a read are. `command` has no bytes unless it is whole.
 * Returns an enum data_verdict. */
int data_parse(const uint8_t *bytes, size_t n_bytes, size_t command_bytes_max, bool may_be_prefixed,
               struct data_command *command);

/* Start the thread that serves the channel, without a socket. It serves nothing before
 * data_channel_begin(). Returns 0 or a negative errno. */
int data_channel_new(struct data_channel **channel, struct tpm *tpm, struct blackout *blackout);

/* Serve, from when the thread is in the sandbox. */
void data_channel_begin(struct data_channel *channel);

/* End the thread, when the command that runs is answered, and free the channel. */
void data_channel_free(struct data_channel *channel);

enum {
    DATA_SOCKET_BUSY = 1, /* the one it has is in use; `fd` stays the caller's */
};

/* Serve this socket from now on, or when the command that runs is done; the channel owns `fd` then.
 * A socket whose other end has hung up gives way. Never waits. Returns 0 or DATA_SOCKET_BUSY. */
int data_channel_set_socket(struct data_channel *channel, int fd);

/* Serve this socket from the start, as enum link_data says, and then no other. The channel owns
 * `fd`. */
void data_channel_serve(struct data_channel *channel, int fd, unsigned flags);

/* Make an eventfd readable once a connection has ended. */
void data_channel_end_with(struct data_channel *channel, int fd);
