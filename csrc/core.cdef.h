/* What vtpmd/core/ uses of pages.h, epoch.h, delta.h, journal_recover.h and engine/lane.h, beside
 * the engine link. cffi reads this file; the compiler holds it against those headers, and works out
 * each `...`. */

#define IMAGE_TYPE_MIN ...
#define IMAGE_TYPE_MAX ...
#define IMAGE_BYTES_MAX ...
#define PAGE_BYTES ...
#define STORE_RANGES_MAX ...
#define GENERATION_MAX ...
#define GENERATION_GIVEN_MAX ...

#define EPOCH_GENERATIONS ...
#define EPOCHS_OF_IMPORTS ...

enum store_result { STORE_BUSY, STORE_DAMAGED, ... };

struct store;

struct store_range {
    uint32_t offset;
    uint32_t n_bytes;
};

struct store_changes {
    uint64_t generation;
    uint32_t image_bytes;
    uint32_t n_bytes;
    uint32_t n_ranges;
    struct store_range ranges[...];
    ...;
};

int store_new(struct store **store);
int store_map(struct store **store, int fd, bool writable);
void store_free(struct store *store);
int store_fd(const struct store *store);
int store_capture(struct store *store, unsigned type, const uint8_t *bytes, size_t n_bytes,
                  uint64_t *generation);
void store_raise_generation(struct store *store, unsigned type, uint64_t floor);
int store_read(struct store *store, unsigned type, uint8_t *out, size_t *n_bytes,
               uint64_t *generation);
int store_collect(struct store *store, unsigned type, uint64_t since,
                  struct store_changes *changes);

#define DIGEST_BYTES ...
#define DIGEST_PAGE_BYTES ...

struct image_digest {
    uint8_t whole[...];
    ...;
};

struct delta_image {
    const uint8_t *bytes;
    size_t n_bytes;
    uint64_t generation;
    const struct image_digest *digest;
    uint64_t time_ms;
    ...;
};

int image_digest_compute(const struct delta_image *image, const struct delta_image *before,
                         struct image_digest *digest);

#define DELTA_HEADER_BYTES ...
#define DELTA_DATED_HEADER_BYTES ...
#define DELTA_TIME_MS_MAX ...
#define DELTA_HEADER_BYTES_MAX ...
#define DELTA_NUMBER_BYTES_MAX ...
#define DELTA_OPERATIONS_EXCESS_MAX ...
#define DELTA_RECORD_BYTES_MAX ...

enum delta_refusal {
    DELTA_SHORT,
    DELTA_NO_RECORD,
    DELTA_VERSION_UNKNOWN,
    DELTA_FLAG_UNKNOWN,
    DELTA_HEADER_WRONG,
    DELTA_LENGTH_WRONG,
    DELTA_CHECKSUM_WRONG,
    DELTA_LIMIT_BROKEN,
    DELTA_OTHER_TYPE,
    DELTA_OTHER_BASE,
    DELTA_BASE_DIFFERS,
    DELTA_OPERATION_WRONG,
    DELTA_RESULT_DIFFERS,
    ...
};

struct delta_header {
    uint16_t header_bytes;
    uint16_t compatible_flags;
    uint16_t incompatible_flags;
    uint8_t type;
    uint64_t from_generation;
    uint64_t to_generation;
    uint32_t base_bytes;
    uint32_t result_bytes;
    uint32_t operations_bytes;
    uint64_t time_ms;
    uint8_t base_digest[...];
    uint8_t result_digest[...];
    ...;
};

int delta_encode(unsigned type, const struct delta_image *base, const struct delta_image *next,
                 uint8_t *record, size_t *record_bytes);
int delta_inspect(const uint8_t *record, size_t record_bytes, struct delta_header *header);
int delta_apply(unsigned type, const struct delta_image *base, const uint8_t *record,
                size_t record_bytes, uint8_t *result, struct delta_header *header,
                struct image_digest *digest);
int delta_make(const struct delta_image *base, const uint8_t *record,
               const struct delta_header *header, uint8_t *result);

#define JOURNAL_VERSION ...
#define JOURNAL_SEALED ...
#define JOURNAL_BYTES ...
#define JOURNAL_BYTES_MAX ...
#define JOURNAL_SECTOR_BYTES ...
#define JOURNAL_PAGE_BYTES ...
#define JOURNAL_PAGE_SECTORS ...
#define JOURNAL_HEADER_BYTES ...
#define JOURNAL_IDENTITY_BYTES ...
#define JOURNAL_SECRET_BYTES ...
#define JOURNAL_PART_BYTES ...
#define JOURNAL_RECORD_SECTORS_MAX ...

enum journal_fault {
    JOURNAL_FAULT_NONE,
    JOURNAL_FAULT_LENGTH,
    JOURNAL_FAULT_MAGIC,
    JOURNAL_FAULT_CHECKSUM,
    JOURNAL_FAULT_VERSION,
    JOURNAL_FAULT_FLAG,
    JOURNAL_FAULT_HEADER,
    JOURNAL_FAULT_SECTOR,
    JOURNAL_FAULT_ORDER,
    JOURNAL_FAULT_GAP,
    JOURNAL_FAULT_RECORD,
    JOURNAL_FAULT_LINK,
    JOURNAL_FAULT_DELTA,
    JOURNAL_FAULT_OTHER_BASE,
    ...
};

struct journal_evidence {
    const uint8_t *checkpoint;
    size_t checkpoint_bytes;
    bool continued;
    const uint8_t *journal;
    size_t journal_bytes;
    const uint8_t *identity;
    const uint8_t *secret;
    ...;
};

struct journal_recovery {
    uint8_t verdict;
    uint8_t fault;
    bool has_image;
    bool is_sealed;
    uint32_t offset;
    uint32_t used_bytes;
    uint32_t n_records;
    uint32_t n_applied;
    uint64_t generation;
    size_t image_bytes;
    uint8_t identity[...];
    ...;
};

struct journal_step {
    uint32_t offset;
    uint32_t n_sectors;
    uint32_t delta_offset;
    uint32_t delta_bytes;
    bool is_applied;
    struct delta_header header;
};

struct journal_history {
    size_t n_steps;
    size_t deltas_bytes;
    struct journal_step steps[...];
    uint8_t deltas[...];
};

bool journal_may_start(const struct journal_recovery *recovery);
int journal_recover_history(const struct journal_evidence *evidence, uint8_t *image,
                            struct journal_recovery *recovery, struct journal_history *history);

#define LINEAR_HEADER_BYTES ...
#define LINEAR_STATES ...

struct linear_extent {
    uint32_t offset;
    uint32_t n_bytes;
};

struct linear_header {
    struct linear_extent states[...];
};

enum linear_fault {
    LINEAR_NOTHING,
    LINEAR_FAULT_MAGIC,
    LINEAR_FAULT_VERSION,
    LINEAR_FAULT_SLOTS,
    LINEAR_FAULT_SECTION,
    LINEAR_FAULT_OVERLAP,
    ...
};

enum linear_fault linear_decode(const uint8_t *bytes, size_t n_bytes, uint64_t file_bytes,
                                struct linear_header *header);

#define LANE_SESSION_BYTES ...
#define LANE_KEY_BYTES ...
#define LANE_UUID_BYTES ...
#define LANE_LINEAGE_BYTES ...
#define LANE_CONTENT_BYTES ...
#define LANE_FRAME_BYTES ...
#define LANE_FRAMES_MAX ...

enum lane_kind { LANE_HELLO, LANE_TAKE, LANE_GRANT, LANE_REFUSE, LANE_GO_ON, ... };
enum lane_refusal { LANE_FORGED, LANE_IMPOSSIBLE, LANE_ENDED, ... };

struct lane_frame {
    enum lane_kind kind;
    uint32_t reason;
    uint8_t permanent_digest[...];
    uint8_t volatile_digest[...];
    uint32_t apply_us;
    uint32_t start_us;
    ...;
};

struct lane_keying {
    uint8_t session[...];
    uint8_t key[...];
    uint8_t uuid[...];
    uint8_t lineage[...];
    bool is_greeted;
    ...;
};

struct lane;

int lane_new(struct lane **lane, const struct lane_keying *keying, bool is_source);
void lane_free(struct lane *lane);
int lane_seal(struct lane *lane, const struct lane_frame *frame, uint8_t *bytes);
int lane_open(struct lane *lane, const uint8_t *bytes, struct lane_frame *frame);

void slice_be_short(void);
void slice_be_usual(void);

uint32_t crc32c(const uint8_t *bytes, size_t n_bytes);

void explicit_bzero(void *bytes, size_t n_bytes);
