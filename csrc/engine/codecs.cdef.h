/* The engine's codecs without I/O, control.h, blob.h and swtpm_format.h, and the limits of tail.h,
 * as tests hold them against the documents, and blobs against Python's; and unasked.h, which the
 * simulator goes by. Only tests use them: an extension of their own would cost a third build, and
 * they are some kilobytes. cffi reads this file; the compiler holds it against those headers, and
 * works out each `...`. */

struct iovec {
    void *iov_base;
    size_t iov_len;
    ...;
};

#define CONTROL_BLOB_BYTES_MAX ...
#define CONTROL_HASH_DATA_BYTES_MAX ...
#define CONTROL_INFO_BYTES_MAX ...
#define CONTROL_EXCESS_BYTES_MAX ...
#define CONTROL_DESCRIPTORS_MAX ...
#define CONTROL_N_NUMBERS ...
#define CONTROL_STOPPED ...
#define CONTROL_RUNNING ...
#define CONTROL_INIT_DELETE_VOLATILE ...
#define CONTROL_STATE_DECRYPTED ...
#define CONTROL_STATE_ENCRYPTED ...
#define CONTROL_CONFIG_FILE_KEY ...

enum control_verdict { CONTROL_NEED_DATA, CONTROL_REQUEST, CONTROL_REFUSED, CONTROL_CLOSED };

#define TAIL_VERSION ...
#define TAIL_HEADER_BYTES ...
#define TAIL_BYTES_MAX ...

struct control_command {
    const char *name;
    uint32_t data_bytes_max;
    bool drops_excess;
    uint8_t n_descriptors;
    uint8_t powers;
    uint8_t powers_to_ask;
    uint8_t answer_bytes;
    uint8_t error_bytes;
    uint32_t capability;
    ...;
};

struct control_event {
    uint32_t number;
    uint64_t flags;
    uint64_t type;
    uint64_t offset;
    uint64_t locality;
    uint64_t wanted_bytes;
    uint64_t retries;
    uint64_t data_bytes;
    const uint8_t *data;
    int descriptor;
    uint32_t result;
    ...;
};

struct control {
    ...;
};

const struct control_command *control_command_of(uint32_t number);
size_t control_request_bytes(const struct control_command *command);
void control_init(struct control *control);
void control_deinit(struct control *control);
void control_receive(struct control *control, const uint8_t *bytes, size_t n_bytes,
                     const int *descriptors, size_t n_descriptors);
int control_next(struct control *control, int power, struct control_event *event);
void control_answer_result(struct control *control, uint32_t result);
void control_answer_capability(struct control *control, bool takes_prefix);
void control_answer_established(struct control *control, bool established);
void control_answer_config(struct control *control, uint32_t flags);
void control_answer_buffer_size(struct control *control, uint32_t bytes, uint32_t bytes_min,
                                uint32_t bytes_max);
void control_answer_state_blob(struct control *control, const struct iovec *pieces, size_t n_pieces,
                               bool is_encrypted);
void control_answer_info(struct control *control, const char *text);
size_t control_output(struct control *control, struct iovec **vectors);
void control_sent(struct control *control, size_t n_bytes);

#define SWTPM_PIECES ...
#define SWTPM_BLOB ...

struct cipher_key {
    uint32_t n_bytes;
    uint8_t bytes[...];
};

struct checkpoint_lineage {
    uint8_t identity[...];
    uint64_t generation;
    bool continued;
    bool sleeps;
};

struct swtpm_wrapped {
    ...;
};

struct blob_content {
    const uint8_t *state;
    size_t state_bytes;
    bool has_lineage;
    struct checkpoint_lineage lineage;
    ...;
};

struct blob_keys {
    const struct cipher_key *file;
    const struct cipher_key *migration;
};

int swtpm_wrap(int kind, const struct cipher_key *key, const uint8_t *state, size_t state_bytes,
               const struct checkpoint_lineage *lineage, struct swtpm_wrapped *wrapped);
int swtpm_seal_blob(struct swtpm_wrapped *wrapped, const struct cipher_key *migration_key);
void swtpm_wrapped_deinit(struct swtpm_wrapped *wrapped);
void swtpm_wrapped_pieces(struct swtpm_wrapped *wrapped, struct iovec *pieces);
int blob_decode(const uint8_t *blob, size_t blob_bytes, bool is_encrypted,
                const struct blob_keys *keys, struct blob_content *content);
void blob_content_deinit(struct blob_content *content);
uint32_t blob_result(int refusal);

#define UNASKED_WAIT_MS ...
#define UNASKED_GO_ON ...
#define UNASKED_DONE ...
#define UNASKED_AWAIT ...
#define UNASKED_WAIT ...
#define UNASKED_REFUSE ...

enum tpm_power {... };
enum unasked {... };
enum unasked_command {
    UNASKED_INIT,
    UNASKED_INIT_NEW,
    UNASKED_INIT_TAIL,
    UNASKED_STOP,
    UNASKED_STATE,
    UNASKED_BLOB,
    UNASKED_TAIL,
    UNASKED_CONNECTED,
    UNASKED_RUNS
};

enum unasked unasked_verdict(enum unasked_command command, enum tpm_power power,
                             enum tpm_custody custody);
