/* A small libnvidia-ml.so.1 for tests: answers from a text file of key=value lines, read anew at each call.
 *
 *   FAKE_NVML_STATE names the file. Keys: count, driver, cuda, and per GPU N: N.uuid N.name N.total N.used (bytes)
 *   N.capability (e.g. 90) N.utilization N.temperature N.power (mW) N.processes and N.drawing ("pid:bytes,pid:bytes").
 *   error.FUNCTION=CODE or error.FUNCTION.N=CODE makes that function fail; delay.FUNCTION=MS makes it slow.
 * Compiled with -DOLD_DRIVER it lacks the newer functions, as an old driver does.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned int gpu, memory; } utilization;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu_instance, compute_instance; } process;
typedef struct { unsigned int version, sensor; int temperature; } temperature_v1;

static int lookup(const char *key, char *value, size_t size) {
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    int found = 0;
    while (file && fgets(line, sizeof line, file)) {
        char *equals = strchr(line, '=');
        if (!equals) continue;
        *equals = 0;
        if (strcmp(line, key)) continue;
        snprintf(value, size, "%s", equals + 1);
        value[strcspn(value, "\n")] = 0;
        found = 1;
    }
    if (file) fclose(file);
    return found;
}

static long long number(const char *key, long long otherwise) {
    char value[256];
    return lookup(key, value, sizeof value) ? atoll(value) : otherwise;
}

static long long of_gpu(int gpu, const char *name) {
    char key[64];
    snprintf(key, sizeof key, "%d.%s", gpu, name);
    return number(key, 0);
}

/* Wait and fail as the state asks; gpu is -1 for a call that concerns no GPU. */
static int enter(const char *function, int gpu) {
    char key[128];
    snprintf(key, sizeof key, "delay.%s", function);
    long long ms = number(key, 0);
    struct timespec wait = {ms / 1000, ms % 1000 * 1000000};
    if (ms) nanosleep(&wait, NULL);
    snprintf(key, sizeof key, "error.%s.%d", function, gpu);
    int code = (int)number(key, 0);
    if (code) return code;
    snprintf(key, sizeof key, "error.%s", function);
    return (int)number(key, 0);
}

static int gpu_of(void *device) { return (int)(long)device - 1; }

#define ENTER(gpu) do { int code = enter(__func__, gpu); if (code) return code; } while (0)

int nvmlInitWithFlags(unsigned int flags) { (void)flags; ENTER(-1); return 0; }
int nvmlShutdown(void) { return 0; }

const char *nvmlErrorString(int code) {
    return code == 15 ? "GPU is lost" : code == 999 ? "Unknown Error" : "some error";
}

static int text(const char *key, char *out, unsigned int size) { return lookup(key, out, size) ? 0 : 999; }

int nvmlSystemGetDriverVersion(char *out, unsigned int size) { ENTER(-1); return text("driver", out, size); }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { ENTER(-1); *out = (int)number("cuda", 0); return 0; }
int nvmlDeviceGetCount_v2(unsigned int *out) { ENTER(-1); *out = (unsigned int)number("count", 0); return 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
    ENTER((int)index);
    *device = (void *)(long)(index + 1);
    return 0;
}

int nvmlDeviceGetUUID(void *device, char *out, unsigned int size) {
    char key[64];
    ENTER(gpu_of(device));
    snprintf(key, sizeof key, "%d.uuid", gpu_of(device));
    return text(key, out, size);
}

int nvmlDeviceGetName(void *device, char *out, unsigned int size) {
    char key[64];
    ENTER(gpu_of(device));
    snprintf(key, sizeof key, "%d.name", gpu_of(device));
    return text(key, out, size);
}

int nvmlDeviceGetMemoryInfo(void *device, memory_v1 *out) {
    int gpu = gpu_of(device);
    ENTER(gpu);
    out->total = of_gpu(gpu, "total");
    out->used = of_gpu(gpu, "used");
    out->free = out->total - out->used;
    return 0;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned int *out) {
    ENTER(gpu_of(device));
    *out = (unsigned int)of_gpu(gpu_of(device), "power");
    return 0;
}

int nvmlDeviceGetUtilizationRates(void *device, utilization *out) {
    ENTER(gpu_of(device));
    out->gpu = (unsigned int)of_gpu(gpu_of(device), "utilization");
    out->memory = 0;
    return 0;
}

int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    ENTER(gpu_of(device));
    *major = (int)of_gpu(gpu_of(device), "capability") / 10;
    *minor = (int)of_gpu(gpu_of(device), "capability") % 10;
    return 0;
}

int nvmlDeviceGetTemperature(void *device, unsigned int sensor, unsigned int *out) {
    (void)sensor;
    ENTER(gpu_of(device));
    *out = (unsigned int)of_gpu(gpu_of(device), "temperature");
    return 0;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *out) {
    int gpu = gpu_of(device);
    if (out->version != 0x02000028) return 25;
    ENTER(gpu);
    out->total = of_gpu(gpu, "total");
    out->used = of_gpu(gpu, "used");
    out->reserved = of_gpu(gpu, "reserved");
    out->free = out->total - out->used - out->reserved;
    return 0;
}

int nvmlDeviceGetTemperatureV(void *device, temperature_v1 *out) {
    if (out->version != 0x100000C) return 25;
    ENTER(gpu_of(device));
    out->temperature = (int)of_gpu(gpu_of(device), "temperature");
    return 0;
}

static int processes(const char *name, void *device, unsigned int *count, process *out) {
    char key[64], value[256] = "";
    unsigned int needed = 0, room = *count;
    snprintf(key, sizeof key, "%d.%s", gpu_of(device), name);
    lookup(key, value, sizeof value);
    char *rest = value, *item;
    while ((item = strtok_r(rest, ",", &rest))) {
        if (out && needed < room) {
            unsigned int pid = 0;
            unsigned long long used = 0;
            /* "pid:?" is a driver that does not tell how much: NVML_VALUE_NOT_AVAILABLE. */
            if (sscanf(item, "%u:%llu", &pid, &used) < 2) used = ~0ULL;
            out[needed] = (process){pid, used, 0, 0};
        }
        needed++;
    }
    *count = needed;
    return needed && (!out || room < needed) ? 7 : 0;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, process *out) {
    ENTER(gpu_of(device));
    return processes("processes", device, count, out);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned int *count, process *out) {
    ENTER(gpu_of(device));
    return processes("drawing", device, count, out);
}
#endif
