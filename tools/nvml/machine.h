/* GPUs in one mapped file: the layout, and what nvml.c asks of machine.c. machine.py mirrors the layout; a test
 * compares the two through fake_nvml_layout(). Whoever changes a field raises VERSION.
 */
#ifndef MACHINE_H
#define MACHINE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define MAGIC 0x4c4d564e454b4146ull /* "FAKENVML", little endian */
#define VERSION 3
#define GPUS 16
#define CLOCKS 256
#define PIDS 16
#define SLOTS 32
#define FAULTS 64
#define WRITES 1024
#define EXPORT __attribute__((visibility("default")))

enum { OK, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 6, INSUFFICIENT_SIZE,
       DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, ARGUMENT_VERSION_MISMATCH = 25, INSUFFICIENT_RESOURCES = 23 };

enum { REASON_IDLE = 0x1, REASON_POWER_CAP = 0x4, REASON_HW_SLOWDOWN = 0x8, REASON_SW_THERMAL = 0x20,
       REASON_HW_THERMAL = 0x40 };

enum { WRITE_LOCK = 1, WRITE_UNLOCK, WRITE_POWER_LIMIT, WRITE_PERSISTENCE };

/* What moves a GPU from one moment to the next. The first four are NVML's writes. */
enum { OP_LOCK = 1, OP_UNLOCK, OP_POWER_LIMIT, OP_PERSISTENCE, OP_WORK, OP_ENFORCE, OP_THERMAL, OP_CONTEXT,
       OP_COUNTER, OP_DRIVER, OP_RESET };
#define BY_OTHER 0x100 /* added to one of NVML's writes: not counted, since it was not a caller of this library */

/* One moment of one GPU, and all that decides what comes after it. Clocks are indices into part.clock_mhz. */
struct moment {
    int64_t at_ns;
    int64_t origin_ns; /* the energy counter is refreshed every part.refresh_ns from here on */
    double energy_mj;
    double published_mj; /* energy_mj at the last refresh */
    double counter_base_mj;
    double average_w;
    double util;
    int64_t busy_until_ns;
    int64_t switch_at_ns; /* when `target` becomes `clock` */
    int64_t cap_ns;
    int64_t thermal_ns;
    uint64_t effective; /* writes of NVML that took effect */
    uint32_t clock;
    uint32_t target;
    uint32_t locked;
    uint32_t low;
    uint32_t high;
    uint32_t thermal_mhz; /* 0: none */
    uint32_t thermal_hardware;
    uint32_t context; /* a context keeps the clock of an idle GPU up */
    uint32_t limit_mw;
    uint32_t enforced_mw; /* a limit from elsewhere; 0: none */
    uint32_t persistence;
    uint32_t unused;
};

struct slot {
    _Atomic uint64_t owner;
    uint64_t version;
    struct moment moment;
};

/* Never changes after creation. */
struct part {
    char uuid[48];
    char name[96];
    char serial[32];
    char bus_id[32];
    uint32_t pci_device_id;
    uint32_t clocks;
    uint32_t memory_mhz;
    uint32_t idle_clock;
    uint32_t architecture;
    uint32_t capability_major;
    uint32_t capability_minor;
    uint32_t limit_mw;
    uint32_t limit_min_mw;
    uint32_t limit_max_mw;
    uint32_t context;
    uint32_t boost_clock; /* what a busy GPU reaches without a lock */
    uint32_t cores;
    uint32_t memory_bus_bits;
    uint64_t memory_bytes;
    int64_t refresh_ns;
    double idle_w;
    uint32_t clock_mhz[CLOCKS]; /* ascending */
    double busy_w[CLOCKS];
    int64_t switch_ns[CLOCKS];
};

/* Single words that Python sets; they move neither clock nor energy. */
struct control {
    _Atomic uint64_t attempted;
    uint64_t memory_used_bytes;
    uint64_t counter_stands_mj; /* what a counter that stands still shows, plus 1; 0: it moves */
    uint32_t permission_denied;
    uint32_t root_only;
    uint32_t lost;
    uint32_t mig;
    uint32_t no_energy;
    uint32_t no_power;
    uint32_t temperature_c;
    uint32_t process_count;
    uint32_t mps_count;
    uint32_t process_pids[PIDS];
    uint32_t mps_pids[PIDS];
    uint32_t module_mw; /* what the counter counts beside the GPU: the rest of a module */
};

struct gpu {
    struct part part;
    struct control control;
    _Atomic uint64_t head; /* version << 8 | index of the slot that holds the present */
    struct slot slots[SLOTS];
};

struct fault {
    _Atomic uint32_t active;
    int32_t gpu; /* -1: any */
    int32_t pid; /* 0: any */
    int32_t error;
    uint32_t kill; /* 1: before the effect, 2: after it */
    int32_t times; /* -1: for ever */
    int64_t sleep_ns;
    uint64_t nth;
    _Atomic uint64_t seen;
    char call[64];
};

struct write {
    _Atomic uint64_t number; /* from 1; written last */
    int64_t at_ns;
    int32_t pid;
    int32_t gpu;
    int32_t op;
    uint32_t low;
    uint32_t high;
    int32_t result;
};

struct machine {
    _Atomic uint64_t magic; /* written last */
    uint64_t nonce; /* tells two files of the same name, or of the same inode, apart */
    uint32_t version;
    uint32_t size;
    uint32_t gpu_count;
    uint32_t cuda_version;
    _Atomic uint64_t driver; /* generation << 1 | loaded */
    char driver_version[32];
    char nvml_version[32];
    _Atomic uint32_t stop_inside_pid; /* that process stops itself in the midst of its next change */
    _Atomic uint32_t faults_active;
    _Atomic uint64_t write_count;
    struct fault faults[FAULTS];
    struct write writes[WRITES];
    struct gpu gpus[GPUS];
};

/* What Python may know of a GPU and NVML's callers may not. */
struct truth {
    double energy_j;
    double watts;
    double average_w;
    double util;
    uint64_t effective;
    uint64_t reasons;
    uint32_t clock_mhz;
    uint32_t target_mhz;
    uint32_t locked;
    uint32_t low_mhz;
    uint32_t high_mhz;
    uint32_t limit_mw;
    uint32_t enforced_mw;
    uint32_t persistence;
};

/* The present of a GPU: its last written moment, carried on to now. */
struct present {
    struct moment moment;
    uint64_t reasons;
    double watts;
    uint32_t clock_mhz;
    uint32_t enforced_mw;
};

int64_t now_ns(void);
struct machine *attach(bool again); /* NULL: no state file, or one that is not ours */
void look(struct gpu *gpu, struct present *present);
int change(struct machine *machine, unsigned index, int op, double a, double b);
uint32_t nearest(const struct part *part, double mhz);
int fault_before(struct machine *machine, const char *call, int gpu, bool *kill_after);
void die(void);
void log_write(struct machine *machine, int gpu, int op, uint32_t low, uint32_t high, int result);

#endif
