/* The GPUs themselves: clock, power, energy, faults, and the log of writes. Knows nothing of NVML's calls.
 *
 * No process may ever wait for another: any of them can be stopped or killed at any instruction. So there is no lock.
 * A GPU is an immutable `moment` in one of its slots, and `head` says which. A change copies it, carries it on to now,
 * alters the copy in a slot of its own and swings `head` there by compare-and-swap; if somebody was faster it begins
 * again. Readers copy, and look whether `head` moved meanwhile. The present is always worked out from the last moment:
 * reading changes nothing.
 *
 * owner of a slot: 0 is free, else pid << 32 | serial number << 1 | writing. Nobody but the owner may touch a slot that
 * is being written, unless its process is dead; one that was written and lost the race or was replaced is anybody's.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define AVERAGE_S 1.0 /* the driver's average power is over a second */

int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

/* ---- the file ------------------------------------------------------------------------------------------------ */

static struct machine *map_file(const struct stat *stat, int file) {
    if (stat->st_size != (off_t)sizeof(struct machine)) return NULL;
    void *at = mmap(NULL, sizeof(struct machine), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at == MAP_FAILED) return NULL;
    struct machine *machine = at;
    if (atomic_load(&machine->magic) == MAGIC && machine->version == VERSION &&
        machine->size == sizeof(struct machine) && machine->gpu_count >= 1 && machine->gpu_count <= GPUS)
        return machine;
    munmap(at, sizeof(struct machine));
    return NULL;
}

/* An earlier mapping stays: another thread may be in the midst of a call. */
struct machine *attach(bool again) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static struct machine *_Atomic attached;
    struct machine *found = atomic_load(&attached);
    if (found && !again) return found;
    pthread_mutex_lock(&mutex);
    const char *path = getenv("FAKE_NVML_STATE");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    struct stat stat;
    struct machine *mapped = file >= 0 && fstat(file, &stat) == 0 ? map_file(&stat, file) : NULL;
    if (file >= 0) close(file);
    if (found && mapped && found->nonce == mapped->nonce) munmap(mapped, sizeof *mapped);
    else found = mapped;
    atomic_store(&attached, found);
    pthread_mutex_unlock(&mutex);
    return found;
}

/* ---- the law ------------------------------------------------------------------------------------------------- */

static double watts_at(const struct part *part, uint32_t clock, double util) {
    return part->idle_w + util * (part->busy_w[clock] - part->idle_w);
}

static uint32_t enforced_mw(const struct moment *moment) {
    if (moment->enforced_mw && moment->enforced_mw < moment->limit_mw) return moment->enforced_mw;
    return moment->limit_mw;
}

/* The clock that a GPU runs at, below what is set if heat or power ask for it; these act at once. */
static uint32_t clock_now(const struct part *part, const struct moment *moment, uint64_t *reasons) {
    uint32_t clock = moment->clock, before = clock;
    *reasons = moment->util > 0 ? 0 : REASON_IDLE;
    while (moment->thermal_mhz && clock && part->clock_mhz[clock] > moment->thermal_mhz) clock--;
    if (clock < before) *reasons |= moment->thermal_hardware ? REASON_HW_THERMAL | REASON_HW_SLOWDOWN : REASON_SW_THERMAL;
    before = clock;
    while (clock && watts_at(part, clock, moment->util) * 1000 >= enforced_mw(moment) + 1.0) clock--;
    if (clock < before) *reasons |= REASON_POWER_CAP;
    return clock;
}

/* The clock that a GPU tends to: the boost clock if busy, the idle clock otherwise; within the lock, if there is one. */
static void settle(const struct part *part, struct moment *moment, int64_t at_ns) {
    uint32_t wanted = moment->util > 0 || moment->context ? part->boost_clock : part->idle_clock;
    if (moment->locked && wanted < moment->low) wanted = moment->low;
    if (moment->locked && wanted > moment->high) wanted = moment->high;
    if (wanted == moment->target) return;
    moment->target = wanted;
    moment->switch_at_ns = at_ns + part->switch_ns[wanted];
}

static void integrate(const struct part *part, struct moment *moment, int64_t to_ns) {
    int64_t from_ns = moment->at_ns, lasts_ns = to_ns - from_ns;
    if (lasts_ns <= 0) return;
    uint64_t reasons;
    double watts = watts_at(part, clock_now(part, moment, &reasons), moment->util);
    int64_t tick_ns = to_ns - (part->refresh_ns ? (to_ns - moment->origin_ns) % part->refresh_ns : 0);
    if (tick_ns > from_ns) moment->published_mj = moment->energy_mj + watts * (tick_ns - from_ns) * 1e-6;
    moment->energy_mj += watts * lasts_ns * 1e-6;
    moment->average_w = watts + (moment->average_w - watts) * exp(-lasts_ns * 1e-9 / AVERAGE_S);
    if (reasons & REASON_POWER_CAP) moment->cap_ns += lasts_ns;
    if (reasons & (REASON_SW_THERMAL | REASON_HW_THERMAL)) moment->thermal_ns += lasts_ns;
    moment->at_ns = to_ns;
}

/* From event to event; between two of them power is constant. */
static void carry_on(const struct part *part, struct moment *moment, int64_t to_ns) {
    for (;;) {
        bool ends = moment->util > 0 && moment->busy_until_ns <= to_ns;
        bool switches = moment->target != moment->clock && moment->switch_at_ns <= to_ns;
        if (ends && switches) *(moment->busy_until_ns < moment->switch_at_ns ? &switches : &ends) = false;
        integrate(part, moment, ends ? moment->busy_until_ns : switches ? moment->switch_at_ns : to_ns);
        if (ends) {
            moment->util = 0;
            settle(part, moment, moment->at_ns);
        } else if (switches) {
            moment->clock = moment->target;
        } else {
            return;
        }
    }
}

static void anew(const struct part *part, struct moment *moment, int64_t at_ns) {
    *moment = (struct moment){.at_ns = at_ns, .origin_ns = at_ns, .average_w = part->idle_w, .context = part->context,
                              .limit_mw = part->limit_mw, .persistence = 1};
    moment->clock = moment->target = part->context ? part->boost_clock : part->idle_clock;
}

uint32_t nearest(const struct part *part, double mhz) {
    uint32_t best = 0;
    for (uint32_t clock = 1; clock < part->clocks; clock++)
        if (fabs(part->clock_mhz[clock] - mhz) < fabs(part->clock_mhz[best] - mhz)) best = clock;
    return best;
}

static void apply(const struct part *part, struct moment *moment, int op, double a, double b) {
    switch (op) {
    case OP_LOCK:
        moment->locked = 1, moment->low = nearest(part, a), moment->high = nearest(part, b);
        break;
    case OP_DRIVER: /* what a reload of the driver forgets */
        moment->limit_mw = part->limit_mw, moment->persistence = 0, moment->counter_base_mj = moment->energy_mj;
        moment->published_mj = moment->energy_mj;
        /* fall through */
    case OP_UNLOCK: moment->locked = 0; break;
    case OP_POWER_LIMIT: moment->limit_mw = (uint32_t)a; break;
    case OP_PERSISTENCE: moment->persistence = (uint32_t)a; break;
    case OP_WORK: moment->util = a, moment->busy_until_ns = moment->at_ns + (int64_t)(b * 1e9); break;
    case OP_ENFORCE: moment->enforced_mw = (uint32_t)a; break;
    case OP_THERMAL: moment->thermal_mhz = (uint32_t)a, moment->thermal_hardware = b > 0; break;
    case OP_CONTEXT: moment->context = a > 0; break;
    case OP_COUNTER: moment->counter_base_mj = moment->published_mj = moment->energy_mj; break;
    case OP_RESET: anew(part, moment, moment->at_ns); break;
    }
}

/* ---- one moment to the next ----------------------------------------------------------------------------------- */

static uint64_t copy_moment(struct gpu *gpu, struct moment *moment) {
    for (;;) {
        uint64_t head = atomic_load(&gpu->head);
        memcpy(moment, &gpu->slots[head & 0xff].moment, sizeof *moment);
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load(&gpu->head) == head) return head;
    }
}

void look(struct gpu *gpu, struct present *present) {
    copy_moment(gpu, &present->moment);
    carry_on(&gpu->part, &present->moment, now_ns());
    uint32_t clock = clock_now(&gpu->part, &present->moment, &present->reasons);
    present->watts = watts_at(&gpu->part, clock, present->moment.util);
    present->clock_mhz = gpu->part.clock_mhz[clock];
    present->enforced_mw = enforced_mw(&present->moment);
}

static uint64_t new_token(void) {
    static _Atomic uint32_t serial;
    return (uint64_t)getpid() << 32 | (uint32_t)(atomic_fetch_add(&serial, 1) << 1) | 1;
}

/* Written, but `head` is past it: its owner can only have failed, or it was replaced. */
static bool abandoned(const struct slot *slot, uint64_t owner, uint64_t head) {
    if (!(owner & 1)) return slot->version <= head >> 8;
    return kill((pid_t)(owner >> 32), 0) != 0 && errno == ESRCH;
}

/* `owner` is read before `head`: a slot that is not the head then, and that its owner gave up, cannot become it. */
static struct slot *claim(struct gpu *gpu, uint64_t token) {
    for (int pass = 0; pass < 2; pass++)
        for (unsigned index = 0; index < SLOTS; index++) {
            struct slot *slot = &gpu->slots[index];
            uint64_t owner = atomic_load(&slot->owner);
            uint64_t head = atomic_load(&gpu->head);
            if ((head & 0xff) == index || (owner && (!pass || !abandoned(slot, owner, head)))) continue;
            if (!atomic_compare_exchange_strong(&slot->owner, &owner, token)) continue;
            atomic_thread_fence(memory_order_seq_cst);
            return slot;
        }
    return NULL;
}

static void stop_if_asked(struct machine *machine) {
    uint32_t pid = (uint32_t)getpid();
    if (atomic_load(&machine->stop_inside_pid) == pid &&
        atomic_compare_exchange_strong(&machine->stop_inside_pid, &pid, 0))
        raise(SIGSTOP);
}

int change(struct machine *machine, unsigned index, int op, double a, double b) {
    struct gpu *gpu = &machine->gpus[index];
    for (;;) {
        uint64_t token = new_token(), written = token & ~1ull;
        struct slot *slot = claim(gpu, token);
        if (!slot) return INSUFFICIENT_RESOURCES;
        uint64_t head = copy_moment(gpu, &slot->moment);
        struct slot *old = &gpu->slots[head & 0xff];
        uint64_t old_owner = atomic_load(&old->owner);
        int64_t at_ns = now_ns();
        if (head >> 8) carry_on(&gpu->part, &slot->moment, at_ns);
        else slot->moment.at_ns = at_ns;
        apply(&gpu->part, &slot->moment, op & ~BY_OTHER, a, b);
        if (op <= OP_PERSISTENCE) slot->moment.effective++;
        settle(&gpu->part, &slot->moment, slot->moment.at_ns);
        carry_on(&gpu->part, &slot->moment, slot->moment.at_ns);
        slot->version = (head >> 8) + 1;
        stop_if_asked(machine);
        atomic_store(&slot->owner, written);
        uint64_t next = slot->version << 8 | (uint64_t)(slot - gpu->slots);
        if (atomic_compare_exchange_strong(&gpu->head, &head, next)) {
            atomic_compare_exchange_strong(&old->owner, &old_owner, 0);
            return OK;
        }
        atomic_compare_exchange_strong(&slot->owner, &written, 0);
    }
}

/* ---- faults and the log --------------------------------------------------------------------------------------- */

void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static void sleep_for(int64_t lasts_ns) {
    struct timespec left = {lasts_ns / 1000000000, lasts_ns % 1000000000};
    while (nanosleep(&left, &left) && errno == EINTR) {}
}

static bool acts(struct fault *fault, const char *call, int gpu) {
    if (!atomic_load(&fault->active) || strcmp(fault->call, call) != 0) return false;
    if ((fault->gpu >= 0 && fault->gpu != gpu) || (fault->pid && fault->pid != getpid())) return false;
    uint64_t seen = atomic_fetch_add(&fault->seen, 1) + 1;
    return seen >= fault->nth && (fault->times < 0 || seen < fault->nth + (uint64_t)fault->times);
}

int fault_before(struct machine *machine, const char *call, int gpu, bool *kill_after) {
    int error = OK;
    *kill_after = false;
    if (!atomic_load(&machine->faults_active)) return OK;
    for (unsigned index = 0; index < FAULTS; index++) {
        struct fault *fault = &machine->faults[index];
        if (!acts(fault, call, gpu)) continue;
        if (fault->sleep_ns) sleep_for(fault->sleep_ns);
        if (fault->kill == 1) die();
        if (fault->kill == 2) *kill_after = true;
        if (fault->error) error = fault->error;
    }
    return error;
}

void log_write(struct machine *machine, int gpu, int op, uint32_t low, uint32_t high, int result) {
    uint64_t number = atomic_fetch_add(&machine->write_count, 1) + 1;
    struct write *write = &machine->writes[(number - 1) % WRITES];
    atomic_store(&write->number, 0);
    write->at_ns = now_ns(), write->pid = getpid(), write->gpu = gpu, write->op = op;
    write->low = low, write->high = high, write->result = result;
    atomic_store(&write->number, number);
}

/* ---- for engines and Python; NVML has none of these ----------------------------------------------------------- */

static bool sensible(double util, double valid_s) {
    return util >= 0 && util <= 1.5 && valid_s >= 0 && valid_s <= 1e6;
}

/* What an engine says of itself: so busy, for so long unless it says more. A dead engine is idle soon. */
EXPORT int fake_nvml_work(unsigned gpu, double util, double valid_s) {
    struct machine *machine = attach(false);
    if (!machine || !(atomic_load(&machine->driver) & 1)) return DRIVER_NOT_LOADED;
    if (gpu >= machine->gpu_count || !sensible(util, valid_s)) return INVALID_ARGUMENT;
    if (machine->gpus[gpu].control.lost) return GPU_IS_LOST;
    return change(machine, gpu, OP_WORK, util, valid_s);
}

/* MHz now; 0 if there is no such GPU. */
EXPORT unsigned fake_nvml_clock(unsigned gpu) {
    struct machine *machine = attach(false);
    struct present present;
    if (!machine || gpu >= machine->gpu_count) return 0;
    look(&machine->gpus[gpu], &present);
    return present.clock_mhz;
}

EXPORT int fake_nvml_change(struct machine *machine, unsigned gpu, int op, double a, double b) {
    if (op == OP_WORK && !sensible(a, b)) return INVALID_ARGUMENT;
    return change(machine, gpu, op, a, b);
}

EXPORT void fake_nvml_truth(struct machine *machine, unsigned index, struct truth *truth) {
    struct gpu *gpu = &machine->gpus[index];
    struct present present;
    look(gpu, &present);
    const struct moment *moment = &present.moment;
    *truth = (struct truth){
        .energy_j = moment->energy_mj / 1000, .watts = present.watts, .average_w = moment->average_w,
        .util = moment->util, .effective = moment->effective, .reasons = present.reasons,
        .clock_mhz = present.clock_mhz, .target_mhz = gpu->part.clock_mhz[moment->target], .locked = moment->locked,
        .low_mhz = gpu->part.clock_mhz[moment->low], .high_mhz = gpu->part.clock_mhz[moment->high],
        .limit_mw = moment->limit_mw, .enforced_mw = present.enforced_mw, .persistence = moment->persistence};
}

#define FIELD(type, field) "struct " #type "." #field, offsetof(struct type, field)
#define SIZE(type) "struct " #type, sizeof(struct type)

/* Sizes and offsets by name; NULL after the last. */
EXPORT const char *fake_nvml_layout(unsigned index, size_t *value) {
    static const struct { const char *name; size_t value; } layout[] = {
        {"magic", MAGIC}, {"version", VERSION}, {SIZE(moment)}, {SIZE(slot)}, {SIZE(part)}, {SIZE(control)},
        {SIZE(gpu)}, {SIZE(fault)}, {SIZE(write)}, {SIZE(machine)}, {SIZE(truth)}, {FIELD(moment, effective)},
        {FIELD(moment, persistence)}, {FIELD(part, name)}, {FIELD(part, clocks)}, {FIELD(part, context)},
        {FIELD(part, memory_bytes)}, {FIELD(part, clock_mhz)}, {FIELD(part, busy_w)}, {FIELD(part, switch_ns)},
        {FIELD(control, lost)}, {FIELD(control, temperature_c)}, {FIELD(control, process_pids)},
        {FIELD(control, mps_pids)}, {FIELD(control, module_mw)},
        {FIELD(part, memory_bus_bits)}, {FIELD(gpu, control)}, {FIELD(gpu, head)}, {FIELD(gpu, slots)},
        {FIELD(fault, sleep_ns)}, {FIELD(fault, seen)}, {FIELD(fault, call)}, {FIELD(write, op)},
        {FIELD(write, result)}, {FIELD(machine, driver)}, {FIELD(machine, stop_inside_pid)},
        {FIELD(machine, write_count)}, {FIELD(machine, faults)}, {FIELD(machine, writes)}, {FIELD(machine, gpus)},
        {FIELD(truth, clock_mhz)}, {FIELD(truth, persistence)},
    };
    if (index >= sizeof layout / sizeof *layout) return NULL;
    *value = layout[index].value;
    return layout[index].name;
}
