/* NVML's calls on the GPUs of machine.c, as nvidia-ml-py 13.615 asks for them: names, structures and return codes of
 * NVIDIA's NVML API reference. A call that is not here is a symbol that is not there, as with an old driver. No call
 * tells the range that the clocks are locked to: the real library has none.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

typedef void *device_t;

enum { CLOCK_GRAPHICS, CLOCK_SM, CLOCK_MEMORY, CLOCK_VIDEO, CLOCK_TYPES };
enum { FIELD_ENERGY = 83, FIELD_POWER_AVERAGE = 185, FIELD_POWER_INSTANT = 186, POLICY_POWER = 0, POLICY_THERMAL = 1 };
enum { VALUE_UNSIGNED = 1, VALUE_UNSIGNED_LONG_LONG = 3 };
#define LIMIT_ID_START 0xffffff00u
#define LIMIT_ID_UNLIMITED 0xffffff02u

struct pci { char bus_id_legacy[16]; uint32_t domain, bus, device, id, subsystem; char bus_id[32]; };
struct pci_ext { uint32_t version, domain, bus, device, id, subsystem, base_class, sub_class; char bus_id[32]; };
struct memory { uint64_t total, free, used; };
struct memory_v2 { uint32_t version; uint64_t total, reserved, free, used; };
struct process { uint32_t pid; uint64_t used; uint32_t gpu_instance, compute_instance; };
struct utilization { uint32_t gpu, memory; };
struct violation { uint64_t reference_us, violation_ns; };
struct temperature { uint32_t version, sensor; int32_t celsius; };
struct gpm_support { uint32_t version, supported; };
struct field {
    uint32_t id, scope;
    int64_t at_us, latency_us;
    uint32_t type, result;
    union { double real; uint32_t small; uint64_t large; } value;
};

static char devices[GPUS]; /* a handle is an address in here */
static pthread_mutex_t init_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct machine *_Atomic current;
static _Atomic uint64_t initialised; /* the driver's generation << 1 | 1; 0: not */
static unsigned users;

struct call {
    const char *name;
    struct machine *machine;
    struct gpu *gpu;
    int index; /* -1: of no GPU */
    bool kill_after;
    struct present now;
};

/* ---- the way in and out of every call ------------------------------------------------------------------------- */

static int ready(struct machine *machine) {
    uint64_t generation = atomic_load(&initialised);
    if (!generation || !machine) return UNINITIALIZED;
    uint64_t driver = atomic_load(&machine->driver);
    if (!(driver & 1)) return DRIVER_NOT_LOADED;
    return driver == generation ? OK : UNINITIALIZED;
}

static int enter(struct call *call, const char *name) {
    *call = (struct call){.name = name, .machine = atomic_load(&current), .index = -1};
    return ready(call->machine);
}

static int enter_gpu(struct call *call, const char *name, device_t device) {
    int result = enter(call, name);
    if (result) return result;
    uintptr_t index = (uintptr_t)device - (uintptr_t)devices;
    if (index >= call->machine->gpu_count) return INVALID_ARGUMENT;
    call->index = (int)index, call->gpu = &call->machine->gpus[index];
    return OK;
}

/* Faults; then what can have changed while the call slept. */
static int pass(struct call *call) {
    int result = fault_before(call->machine, call->name, call->index, &call->kill_after);
    if (!result) result = ready(call->machine);
    if (!result && call->gpu && call->gpu->control.lost) result = GPU_IS_LOST;
    if (!result && call->gpu) look(call->gpu, &call->now);
    return result;
}

static int leave(const struct call *call, int result) {
    if (call->kill_after) die();
    return result;
}

#define BEGIN(wrong)                                            \
    struct call call;                                           \
    int result = enter_gpu(&call, __func__, device);            \
    if (!result && (wrong)) result = INVALID_ARGUMENT;          \
    if (!result) result = pass(&call);                          \
    if (result) return leave(&call, result)

#define BEGIN_SYSTEM(wrong)                                     \
    struct call call;                                           \
    int result = enter(&call, __func__);                        \
    if (!result && (wrong)) result = INVALID_ARGUMENT;          \
    if (!result) result = pass(&call);                          \
    if (result) return leave(&call, result)

#define PART call.gpu->part
#define CONTROL call.gpu->control
#define NOW call.now.moment

#define READ(name, type, expression)                            \
    EXPORT int name(device_t device, type *value) {             \
        BEGIN(!value);                                          \
        *value = expression;                                    \
        return leave(&call, OK);                                \
    }

#define READ_IF(name, type, there, expression)                  \
    EXPORT int name(device_t device, type *value) {             \
        BEGIN(!value);                                          \
        if (!(there)) return leave(&call, NOT_SUPPORTED);       \
        *value = expression;                                    \
        return leave(&call, OK);                                \
    }

static int put_text(const char *from, char *to, unsigned length) {
    if (strlen(from) >= length) return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return OK;
}

#define READ_TEXT(name, from)                                   \
    EXPORT int name(device_t device, char *text, unsigned length) { \
        BEGIN(!text);                                           \
        return leave(&call, put_text(from, text, length));      \
    }

/* ---- the library and the machine ------------------------------------------------------------------------------ */

static int initialise(const char *name) {
    pthread_mutex_lock(&init_mutex);
    struct machine *machine = attach(users == 0);
    int result = DRIVER_NOT_LOADED;
    struct call call = {.name = name, .machine = machine, .index = -1};
    if (machine) {
        atomic_store(&current, machine);
        result = fault_before(machine, name, -1, &call.kill_after);
        uint64_t driver = atomic_load(&machine->driver);
        if (!result && !(driver & 1)) result = DRIVER_NOT_LOADED;
        if (!result) {
            users = driver == atomic_load(&initialised) ? users + 1 : 1;
            atomic_store(&initialised, driver);
        }
    }
    pthread_mutex_unlock(&init_mutex);
    return leave(&call, result);
}

EXPORT int nvmlInit_v2(void) { return initialise(__func__); }

EXPORT int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    return initialise(__func__);
}

EXPORT int nvmlShutdown(void) {
    struct call call;
    int result = enter(&call, __func__);
    if (!result) result = pass(&call);
    pthread_mutex_lock(&init_mutex);
    if (users && --users == 0) atomic_store(&initialised, 0);
    pthread_mutex_unlock(&init_mutex);
    return leave(&call, result);
}

EXPORT const char *nvmlErrorString(int result) {
    static const char *const texts[] = {
        [OK] = "The operation was successful", [UNINITIALIZED] = "Uninitialized",
        [INVALID_ARGUMENT] = "Invalid Argument", [NOT_SUPPORTED] = "Not Supported",
        [NO_PERMISSION] = "Insufficient Permissions", [5] = "Already Initialized", [NOT_FOUND] = "Not Found",
        [INSUFFICIENT_SIZE] = "Insufficient Size", [8] = "Insufficient External Power",
        [DRIVER_NOT_LOADED] = "Driver Not Loaded", [10] = "Timeout", [11] = "Interrupt Request Issue",
        [12] = "NVML Shared Library Not Found", [13] = "Function Not Found", [14] = "Corrupted infoROM",
        [GPU_IS_LOST] = "GPU is lost", [16] = "GPU requires restart",
        [17] = "The operating system has blocked the request.", [18] = "RM has detected an NVML/RM version mismatch.",
        [19] = "In use by another client", [20] = "Insufficient Memory", [21] = "No data",
        [INSUFFICIENT_RESOURCES] = "Ran out of critical resources, other than memory",
        [ARGUMENT_VERSION_MISMATCH] = "Argument version mismatch"};
    if (result < 0 || result >= (int)(sizeof texts / sizeof *texts) || !texts[result]) return "Unknown Error";
    return texts[result];
}

EXPORT int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    BEGIN_SYSTEM(!text);
    return leave(&call, put_text(call.machine->driver_version, text, length));
}

EXPORT int nvmlSystemGetNVMLVersion(char *text, unsigned length) {
    BEGIN_SYSTEM(!text);
    return leave(&call, put_text(call.machine->nvml_version, text, length));
}

EXPORT int nvmlSystemGetCudaDriverVersion(int *version) {
    BEGIN_SYSTEM(!version);
    *version = (int)call.machine->cuda_version;
    return leave(&call, OK);
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    BEGIN_SYSTEM(!version);
    *version = (int)call.machine->cuda_version;
    return leave(&call, OK);
}

EXPORT int nvmlSystemGetProcessName(unsigned pid, char *text, unsigned length) {
    BEGIN_SYSTEM(!text || !length);
    char path[32], name[4096];
    snprintf(path, sizeof path, "/proc/%u/exe", pid);
    ssize_t got = readlink(path, name, sizeof name - 1);
    if (got < 0) return leave(&call, NOT_FOUND);
    name[got] = 0;
    snprintf(text, length, "%s", name); /* the real one cuts, too */
    return leave(&call, OK);
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    BEGIN_SYSTEM(!count);
    *count = call.machine->gpu_count;
    return leave(&call, OK);
}

/* ---- which GPU ------------------------------------------------------------------------------------------------ */

static int handle(struct call *call, unsigned index, device_t *device) {
    call->index = (int)index, call->gpu = &call->machine->gpus[index];
    int result = pass(call);
    if (!result) *device = &devices[index];
    return leave(call, result);
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) {
    struct call call;
    int result = enter(&call, __func__);
    if (!result && (!device || index >= call.machine->gpu_count)) result = INVALID_ARGUMENT;
    return result ? result : handle(&call, index, device);
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device) {
    struct call call;
    int result = enter(&call, __func__);
    if (result || !uuid || !device) return result ? result : INVALID_ARGUMENT;
    for (unsigned index = 0; index < call.machine->gpu_count; index++)
        if (!strcmp(call.machine->gpus[index].part.uuid, uuid)) return handle(&call, index, device);
    return NOT_FOUND;
}

/* With a domain of eight digits, of four, or without one. */
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, device_t *device) {
    struct call call;
    int result = enter(&call, __func__);
    if (result || !bus_id || !device) return result ? result : INVALID_ARGUMENT;
    for (unsigned index = 0; index < call.machine->gpu_count; index++) {
        const char *own = call.machine->gpus[index].part.bus_id;
        if (!strcasecmp(own, bus_id) || !strcasecmp(own + 4, bus_id) || !strcasecmp(own + 9, bus_id))
            return handle(&call, index, device);
    }
    return NOT_FOUND;
}

READ(nvmlDeviceGetIndex, unsigned, (unsigned)call.index)
READ(nvmlDeviceGetMinorNumber, unsigned, (unsigned)call.index)
READ_TEXT(nvmlDeviceGetUUID, PART.uuid)
READ_TEXT(nvmlDeviceGetName, PART.name)
READ_TEXT(nvmlDeviceGetSerial, PART.serial)
READ(nvmlDeviceGetBrand, unsigned, 14) /* NVML_BRAND_NVIDIA */
READ(nvmlDeviceGetArchitecture, unsigned, PART.architecture)
READ_IF(nvmlDeviceGetNumGpuCores, unsigned, PART.cores, PART.cores)
READ_IF(nvmlDeviceGetMemoryBusWidth, unsigned, PART.memory_bus_bits, PART.memory_bus_bits)
READ(nvmlDeviceGetComputeMode, unsigned, 0)
READ(nvmlDeviceGetPerformanceState, unsigned, 0)
READ(nvmlDeviceGetPowerState, unsigned, 0)
READ(nvmlDeviceGetPersistenceMode, unsigned, NOW.persistence)

EXPORT int nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor) {
    BEGIN(!major || !minor);
    *major = (int)PART.capability_major, *minor = (int)PART.capability_minor;
    return leave(&call, OK);
}

EXPORT int nvmlDeviceGetPciInfo_v3(device_t device, struct pci *pci) {
    BEGIN(!pci);
    *pci = (struct pci){.bus = (uint32_t)call.index + 1, .id = PART.pci_device_id};
    snprintf(pci->bus_id, sizeof pci->bus_id, "%s", PART.bus_id);
    snprintf(pci->bus_id_legacy, sizeof pci->bus_id_legacy, "%.12s", PART.bus_id + 4);
    return leave(&call, OK);
}

EXPORT int nvmlDeviceGetPciInfoExt(device_t device, struct pci_ext *pci) {
    BEGIN(!pci);
    if (pci->version != (1u << 24 | sizeof *pci)) return leave(&call, ARGUMENT_VERSION_MISMATCH);
    *pci = (struct pci_ext){.version = pci->version, .bus = (uint32_t)call.index + 1, .id = PART.pci_device_id,
                            .base_class = 3, .sub_class = 2};
    snprintf(pci->bus_id, sizeof pci->bus_id, "%s", PART.bus_id);
    return leave(&call, OK);
}

EXPORT int nvmlDeviceGetMigMode(device_t device, unsigned *is, unsigned *will_be) {
    BEGIN(!is || !will_be);
    *is = *will_be = CONTROL.mig;
    return leave(&call, OK);
}

/* ---- clocks --------------------------------------------------------------------------------------------------- */

static int clock_of(const struct call *call, unsigned type, bool top, unsigned *mhz) {
    const struct part *part = &call->gpu->part;
    if (type >= CLOCK_TYPES) return INVALID_ARGUMENT;
    if (type == CLOCK_VIDEO) return NOT_SUPPORTED;
    if (type == CLOCK_MEMORY) *mhz = part->memory_mhz;
    else *mhz = top ? part->clock_mhz[part->clocks - 1] : call->now.clock_mhz;
    return OK;
}

EXPORT int nvmlDeviceGetClockInfo(device_t device, unsigned type, unsigned *mhz) {
    BEGIN(!mhz);
    return leave(&call, clock_of(&call, type, false, mhz));
}

EXPORT int nvmlDeviceGetMaxClockInfo(device_t device, unsigned type, unsigned *mhz) {
    BEGIN(!mhz);
    return leave(&call, clock_of(&call, type, true, mhz));
}

EXPORT int nvmlDeviceGetClock(device_t device, unsigned type, unsigned id, unsigned *mhz) {
    BEGIN(!mhz || id > 3);
    return leave(&call, id ? NOT_SUPPORTED : clock_of(&call, type, false, mhz));
}

EXPORT int nvmlDeviceGetSupportedMemoryClocks(device_t device, unsigned *count, unsigned *mhz) {
    BEGIN(!count);
    unsigned room = *count;
    *count = 1;
    if (room < 1 || !mhz) return leave(&call, INSUFFICIENT_SIZE);
    *mhz = PART.memory_mhz;
    return leave(&call, OK);
}

EXPORT int nvmlDeviceGetSupportedGraphicsClocks(device_t device, unsigned memory_mhz, unsigned *count, unsigned *mhz) {
    BEGIN(!count);
    if (memory_mhz != PART.memory_mhz) return leave(&call, NOT_FOUND);
    unsigned room = *count;
    *count = PART.clocks;
    if (room < PART.clocks || !mhz) return leave(&call, INSUFFICIENT_SIZE);
    for (unsigned index = 0; index < PART.clocks; index++) mhz[index] = PART.clock_mhz[PART.clocks - 1 - index];
    return leave(&call, OK);
}

#define SUPPORTED_REASONS (REASON_IDLE | REASON_POWER_CAP | REASON_HW_SLOWDOWN | REASON_SW_THERMAL | REASON_HW_THERMAL)
typedef unsigned long long reasons_t;
READ(nvmlDeviceGetCurrentClocksEventReasons, reasons_t, call.now.reasons)
READ(nvmlDeviceGetCurrentClocksThrottleReasons, reasons_t, call.now.reasons)
READ(nvmlDeviceGetSupportedClocksEventReasons, reasons_t, SUPPORTED_REASONS)
READ(nvmlDeviceGetSupportedClocksThrottleReasons, reasons_t, SUPPORTED_REASONS)

EXPORT int nvmlDeviceGetViolationStatus(device_t device, unsigned policy, struct violation *violation) {
    BEGIN(!violation);
    if (policy != POLICY_POWER && policy != POLICY_THERMAL) return leave(&call, NOT_SUPPORTED);
    violation->reference_us = (uint64_t)NOW.at_ns / 1000;
    violation->violation_ns = (uint64_t)(policy == POLICY_POWER ? NOW.cap_ns : NOW.thermal_ns);
    return leave(&call, OK);
}

/* ---- power and energy ----------------------------------------------------------------------------------------- */

/* The counter of a module counts what is beside the GPU, too; it is refreshed with the rest. */
static uint64_t counter_mj(const struct gpu *gpu, const struct moment *moment) {
    if (gpu->control.counter_stands_mj) return gpu->control.counter_stands_mj - 1;
    int64_t lasts_ns = moment->at_ns - moment->origin_ns;
    if (gpu->part.refresh_ns) lasts_ns -= lasts_ns % gpu->part.refresh_ns;
    double beside_mj = (double)gpu->control.module_mw * lasts_ns * 1e-9;
    return (uint64_t)(moment->published_mj - moment->counter_base_mj + beside_mj);
}

static uint32_t milli(double watts) { return (uint32_t)(watts * 1000 + 0.5); }

READ_IF(nvmlDeviceGetTotalEnergyConsumption, unsigned long long, !CONTROL.no_energy, counter_mj(call.gpu, &NOW))
READ_IF(nvmlDeviceGetPowerUsage, unsigned, !CONTROL.no_power, milli(call.now.watts))
READ(nvmlDeviceGetEnforcedPowerLimit, unsigned, call.now.enforced_mw)
READ(nvmlDeviceGetPowerManagementLimit, unsigned, NOW.limit_mw)
READ(nvmlDeviceGetPowerManagementDefaultLimit, unsigned, PART.limit_mw)

EXPORT int nvmlDeviceGetPowerManagementLimitConstraints(device_t device, unsigned *low_mw, unsigned *high_mw) {
    BEGIN(!low_mw || !high_mw);
    *low_mw = PART.limit_min_mw, *high_mw = PART.limit_max_mw;
    return leave(&call, OK);
}

static int read_field(const struct call *call, struct field *field) {
    const struct control *control = &call->gpu->control;
    if (field->scope) return NOT_SUPPORTED; /* of memory or of a module: no such parts here */
    if (field->id == FIELD_ENERGY && !control->no_energy) {
        field->type = VALUE_UNSIGNED_LONG_LONG, field->value.large = counter_mj(call->gpu, &call->now.moment);
        return OK;
    }
    if ((field->id != FIELD_POWER_AVERAGE && field->id != FIELD_POWER_INSTANT) || control->no_power)
        return NOT_SUPPORTED;
    field->type = VALUE_UNSIGNED;
    field->value.small = milli(field->id == FIELD_POWER_INSTANT ? call->now.watts : call->now.moment.average_w);
    return OK;
}

EXPORT int nvmlDeviceGetFieldValues(device_t device, int count, struct field *fields) {
    BEGIN(!fields || count < 1);
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    for (int index = 0; index < count; index++) {
        fields[index].at_us = time.tv_sec * 1000000ll + time.tv_nsec / 1000;
        fields[index].result = (uint32_t)read_field(&call, &fields[index]);
    }
    return leave(&call, OK);
}

/* ---- load, memory, heat, processes ---------------------------------------------------------------------------- */

/* An engine says one figure, and a token's step keeps the memory as busy as the rest. */
EXPORT int nvmlDeviceGetUtilizationRates(device_t device, struct utilization *rates) {
    BEGIN(!rates);
    if (CONTROL.mig) return leave(&call, NOT_SUPPORTED);
    rates->gpu = rates->memory = NOW.util > 1 ? 100 : (uint32_t)(NOW.util * 100 + 0.5);
    return leave(&call, OK);
}

EXPORT int nvmlDeviceGetMemoryInfo(device_t device, struct memory *memory) {
    BEGIN(!memory);
    *memory = (struct memory){PART.memory_bytes, PART.memory_bytes - CONTROL.memory_used_bytes,
                              CONTROL.memory_used_bytes};
    return leave(&call, OK);
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(device_t device, struct memory_v2 *memory) {
    BEGIN(!memory);
    if (memory->version != (2u << 24 | sizeof *memory)) return leave(&call, ARGUMENT_VERSION_MISMATCH);
    memory->total = PART.memory_bytes, memory->reserved = 0, memory->used = CONTROL.memory_used_bytes;
    memory->free = memory->total - memory->used;
    return leave(&call, OK);
}

EXPORT int nvmlDeviceGetTemperature(device_t device, unsigned sensor, unsigned *celsius) {
    BEGIN(!celsius || sensor != 0);
    *celsius = CONTROL.temperature_c;
    return leave(&call, OK);
}

EXPORT int nvmlDeviceGetTemperatureV(device_t device, struct temperature *temperature) {
    BEGIN(!temperature);
    if (temperature->version != (1u << 24 | sizeof *temperature)) return leave(&call, ARGUMENT_VERSION_MISMATCH);
    if (temperature->sensor) return leave(&call, INVALID_ARGUMENT);
    temperature->celsius = (int32_t)CONTROL.temperature_c;
    return leave(&call, OK);
}

static int list(const uint32_t *pids, uint32_t held, unsigned *count, struct process *processes) {
    unsigned room = *count;
    *count = held;
    if (held && (room < held || !processes)) return INSUFFICIENT_SIZE;
    for (uint32_t index = 0; index < held; index++)
        processes[index] = (struct process){pids[index], UINT64_MAX, UINT32_MAX, UINT32_MAX}; /* bytes: not known */
    return OK;
}

#define LIST(name, pids, held)                                  \
    EXPORT int name(device_t device, unsigned *count, struct process *processes) { \
        BEGIN(!count);                                          \
        return leave(&call, list(pids, held, count, processes)); \
    }

LIST(nvmlDeviceGetComputeRunningProcesses_v3, CONTROL.process_pids, CONTROL.process_count)
LIST(nvmlDeviceGetComputeRunningProcesses_v2, CONTROL.process_pids, CONTROL.process_count)
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, CONTROL.mps_pids, CONTROL.mps_count)
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, CONTROL.mps_pids, CONTROL.mps_count)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, CONTROL.process_pids, 0)

#define IDLE_ENGINE(name)                                       \
    EXPORT int name(device_t device, unsigned *percent, unsigned *period_us) { \
        BEGIN(!percent || !period_us);                          \
        *percent = 0, *period_us = 0;                           \
        return leave(&call, OK);                                \
    }

IDLE_ENGINE(nvmlDeviceGetEncoderUtilization)
IDLE_ENGINE(nvmlDeviceGetDecoderUtilization)

/* ---- what the library knows and these GPUs have not ----------------------------------------------------------- */

#define NONE(name, ...)                                         \
    EXPORT int name(device_t device, __VA_ARGS__) {             \
        BEGIN(false);                                           \
        return leave(&call, NOT_SUPPORTED);                     \
    }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
NONE(nvmlDeviceGetTotalEccErrors, unsigned type, unsigned counter, uint64_t *count)
NONE(nvmlDeviceGetPcieThroughput, unsigned counter, unsigned *value)
NONE(nvmlDeviceGetJpgUtilization, unsigned *percent, unsigned *period_us)
NONE(nvmlDeviceGetC2cModeInfoV, void *info)
NONE(nvmlDeviceGetProcessesUtilizationInfo, void *info)
#pragma GCC diagnostic pop

EXPORT int nvmlGpmQueryDeviceSupport(device_t device, struct gpm_support *support) {
    BEGIN(!support);
    if (support->version != 1) return leave(&call, ARGUMENT_VERSION_MISMATCH);
    support->supported = 0;
    return leave(&call, OK);
}

/* ---- writes --------------------------------------------------------------------------------------------------- */

static int permitted(const struct call *call) {
    const struct control *control = &call->gpu->control;
    return control->permission_denied || (control->root_only && geteuid() != 0) ? NO_PERMISSION : OK;
}

static int check(const struct part *part, int op, uint32_t low, uint32_t high) {
    switch (op) {
    case OP_LOCK:
        if ((low >= LIMIT_ID_START) != (high >= LIMIT_ID_START)) return INVALID_ARGUMENT;
        if (low >= LIMIT_ID_START) return NOT_SUPPORTED;
        return low && high && low <= high ? OK : INVALID_ARGUMENT;
    case OP_POWER_LIMIT: return low >= part->limit_min_mw && low <= part->limit_max_mw ? OK : INVALID_ARGUMENT;
    case OP_PERSISTENCE: return low <= 1 ? OK : INVALID_ARGUMENT;
    default: return OK;
    }
}

static int write_to(const char *name, device_t device, int op, uint32_t low, uint32_t high) {
    struct call call;
    int result = enter_gpu(&call, name, device);
    if (result) return result;
    atomic_fetch_add(&CONTROL.attempted, 1);
    result = pass(&call);
    if (!result) result = permitted(&call);
    if (!result) result = check(&PART, op, low, high);
    if (!result) result = change(call.machine, (unsigned)call.index, op, low, high);
    log_write(call.machine, call.index, op, low, high, result);
    return leave(&call, result);
}

EXPORT int nvmlDeviceSetGpuLockedClocks(device_t device, unsigned low_mhz, unsigned high_mhz) {
    bool unlimited = low_mhz == LIMIT_ID_UNLIMITED && high_mhz == LIMIT_ID_UNLIMITED;
    return write_to(__func__, device, unlimited ? OP_UNLOCK : OP_LOCK, low_mhz, high_mhz);
}

EXPORT int nvmlDeviceResetGpuLockedClocks(device_t device) { return write_to(__func__, device, OP_UNLOCK, 0, 0); }

EXPORT int nvmlDeviceSetPowerManagementLimit(device_t device, unsigned limit_mw) {
    return write_to(__func__, device, OP_POWER_LIMIT, limit_mw, 0);
}

EXPORT int nvmlDeviceSetPersistenceMode(device_t device, unsigned mode) {
    return write_to(__func__, device, OP_PERSISTENCE, mode, 0);
}
