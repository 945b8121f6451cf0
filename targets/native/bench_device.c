/* What is known of the machine, from the files of the Linux kernel. */
#define _GNU_SOURCE
#include "bench.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>

enum { MAX_ZONES = 64 };

/* Read the first line of a small file without its end; empty where there is none. */
static void read_line(const char *path, char *out, size_t size)
{
    FILE *file = fopen(path, "r");
    out[0] = 0;
    if (file && !fgets(out, (int)size, file))
        out[0] = 0;
    if (file)
        fclose(file);
    out[strcspn(out, "\r\n")] = 0;
}

/* Find the value of a key in a file of "key : value" lines. */
static int find_value(const char *path, const char *key, char *out, size_t size)
{
    char line[512];
    FILE *file = fopen(path, "r");
    out[0] = 0;
    while (file && !out[0] && fgets(line, sizeof line, file)) {
        size_t length = strlen(key);
        char *value = line + length + strspn(line + length, " \t");
        if (strncmp(line, key, length) || *value != ':')
            continue;
        value += 1 + strspn(value + 1, " \t");
        snprintf(out, size, "%.*s", (int)strcspn(value, "\r\n"), value);
    }
    if (file)
        fclose(file);
    return out[0] != 0;
}

static int first_core(const cpu_set_t *cores)
{
    for (int core = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, cores))
            return core;
    return 0;
}

double hottest_c(void)
{
    char path[96], text[32];
    double hottest = -1;
    for (int zone = 0; zone < MAX_ZONES; zone++) {
        snprintf(path, sizeof path, "/sys/class/thermal/thermal_zone%d/temp", zone);
        read_line(path, text, sizeof text);
        double degrees = text[0] ? atof(text) / 1000 : -1; /* the kernel counts thousandths */
        hottest = degrees > hottest ? degrees : hottest;
    }
    return hottest;
}

void read_device(device *out)
{
    static const char *const names[] = {"model name", "Hardware", "Model"}; /* x86; older and newer ARM boards */
    struct utsname system;
    cpu_set_t cores;
    char path[96], text[32];
    memset(out, 0, sizeof *out);
    uname(&system);
    CPU_ZERO(&cores);
    sched_getaffinity(0, sizeof cores, &cores);
    int first = first_core(&cores), found = 0;
    out->cores = CPU_COUNT(&cores);
    for (size_t at = 0; at < sizeof names / sizeof *names && !found; at++)
        found = find_value("/proc/cpuinfo", names[at], out->cpu_model, sizeof out->cpu_model);
    if (!found) /* boards described by a device tree */
        read_line("/proc/device-tree/model", out->cpu_model, sizeof out->cpu_model);
    if (!out->cpu_model[0])
        snprintf(out->cpu_model, sizeof out->cpu_model, "%s", system.machine);
    snprintf(out->machine, sizeof out->machine, "%s", system.machine);
    snprintf(out->os, sizeof out->os, "%s %s", system.sysname, system.release);
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cpufreq/scaling_governor", first);
    read_line(path, out->governor, sizeof out->governor);
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq", first);
    read_line(path, text, sizeof text);
    out->frequency_mhz = text[0] ? atof(text) / 1000 : -1;
    read_line("/proc/loadavg", text, sizeof text);
    out->load_average = text[0] ? atof(text) : -1;
    out->temperature_c = hottest_c();
}

long long peak_rss_bytes(void)
{
    char text[64];
    return find_value("/proc/self/status", "VmHWM", text, sizeof text) ? atoll(text) * 1024 : 0;
}

int pin_cores(const char *list)
{
    cpu_set_t cores;
    int missing = 0;
    CPU_ZERO(&cores);
    for (const char *at = list;; at++) {
        char *end;
        if (*at < '0' || *at > '9')
            return EXIT_USAGE;
        long core = strtol(at, &end, 10);
        if (end - at > 4 || (*end && *end != ','))
            return EXIT_USAGE;
        if (core < CPU_SETSIZE)
            CPU_SET((int)core, &cores);
        else
            missing = 1;
        at = end;
        if (!*at)
            return missing || sched_setaffinity(0, sizeof cores, &cores) ? EXIT_MACHINE : 0;
    }
}
