/* A plugin for QEMU's user mode: counts the instructions that the emulated program executes, on all its threads.
 *
 *     qemu-aarch64 -plugin file=insn_count.so,out=FILE PROGRAM ...       writes the number to FILE at the end
 *
 * What it uses of QEMU's plugin interface is declared here, as distributions do not ship the header. PLUGIN_API is the
 * version of that interface: 1 for QEMU 6 to 8, 2 from QEMU 9 on.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb; /* a translated block: instructions that are executed one after the other */

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*call)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *block, void (*call)(unsigned int, void *), int flags,
                                          void *user);
void qemu_plugin_register_atexit_cb(plugin_id id, void (*call)(plugin_id, void *), void *user);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);

__attribute__((visibility("default"))) int qemu_plugin_version = PLUGIN_API;
__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv);

static uint64_t count;
static char out[4096];

static void executed(unsigned int cpu, void *instructions)
{
    (void)cpu;
    __atomic_fetch_add(&count, (uintptr_t)instructions, __ATOMIC_RELAXED);
}

static void translated(plugin_id id, struct qemu_plugin_tb *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(block, executed, 0, (void *)(uintptr_t)qemu_plugin_tb_n_insns(block));
}

static void ended(plugin_id id, void *user)
{
    (void)id;
    (void)user;
    FILE *file = fopen(out, "w");
    if (file) {
        fprintf(file, "%" PRIu64 "\n", count);
        fclose(file);
    }
}

int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    (void)info;
    if (argc != 1 || strncmp(argv[0], "out=", 4) || strlen(argv[0]) - 4 >= sizeof out)
        return 1;
    strcpy(out, argv[0] + 4);
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
