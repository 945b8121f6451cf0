/* Models in ONNX Runtime, whose shared library is opened when the program runs. */
#define _GNU_SOURCE
#include "bench.h"

#include "ecz.h"
#include "ort_table.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct loaded {
    ort_session *session;
    tensor *inputs, *expected;
    ort_value **values, **outputs;
    const char **input_names, **output_names;
};

static ort_table ort;
static ort_env *environment;

/* Leave the program with that code where status is an error. */
static void check(ort_status *status, int code, const char *what)
{
    if (status)
        fail(code, code == EXIT_MODEL ? "check that this build of the runtime has what the model needs" : "",
             "%s: onnxruntime refuses it: %s", what, ort.get_error_message(status));
}

/* Debian's builds print two lines for each operator, as they register them twice. */
static int silence_errors(void)
{
    int kept = dup(STDERR_FILENO), nothing = open("/dev/null", O_WRONLY);
    dup2(nothing, STDERR_FILENO);
    close(nothing);
    return kept;
}

static void restore_errors(int kept)
{
    dup2(kept, STDERR_FILENO);
    close(kept);
}

const char *open_runtime(const char *library)
{
    union { /* POSIX promises this conversion, C does not */
        void *object;
        const ort_base *(*function)(void);
    } entry;
    setenv("ORT_DISABLE_TELEMETRY", "1", 1); /* official builds report to their maker otherwise */
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    entry.object = handle ? dlsym(handle, "OrtGetApiBase") : NULL;
    if (!entry.object)
        fail(EXIT_MACHINE, "copy the bundle again, or give the runtime's library with --library",
             "the runtime cannot be loaded: %s", dlerror());
    const ort_base *base = entry.function();
    const void *source = base->get_table(ORT_TABLE_VERSION);
    if (!source)
        fail(EXIT_MACHINE, "use version 1.18 or newer", "onnxruntime %s is too old", base->get_version());
    ort_read_table(&ort, source);
    int kept = silence_errors();
    ort_status *status = ort.create_env(ORT_LOG_FATAL, "bench", &environment);
    restore_errors(kept);
    check(status, EXIT_MACHINE, library);
    check(ort.disable_telemetry_events(environment), EXIT_MACHINE, library);
    return base->get_version();
}

/* --- containers --- */

static void *allocate_for_ecz(void *user, size_t size)
{
    (void)user;
    return malloc(size);
}

static void release_for_ecz(void *user, void *memory)
{
    (void)user;
    free(memory);
}

static void check_ecz(int status, const char *path)
{
    if (status)
        fail(status == ECZ_NO_MEMORY ? EXIT_MACHINE : EXIT_DAMAGED, "copy or build the bundle again", "%s: %s", path,
             ecz_message(status));
}

/* Decode a container in memory and open a session on what comes out. */
static void open_container(const char *path, const uint8_t *data, size_t size, ort_options *options,
                           ort_session **session)
{
    static const ecz_allocator allocator = {NULL, allocate_for_ecz, release_for_ecz};
    ecz_container *container;
    check_ecz(ecz_open(data, size, &allocator, &container), path);
    size_t count = ecz_file_count(container);
    const char **names = allocate(count * sizeof *names);
    char **buffers = allocate(count * sizeof *buffers);
    size_t *sizes = allocate(count * sizeof *sizes);
    for (size_t number = 0; number < count; number++) {
        uint64_t length = ecz_file_size(container, number);
        if (length > SIZE_MAX / 2)
            fail(EXIT_MACHINE, "", "%s: it does not fit into the memory", path);
        names[number] = ecz_file_name(container, number);
        sizes[number] = (size_t)length;
        buffers[number] = allocate(sizes[number]);
        check_ecz(ecz_read_file(container, number, (uint8_t *)buffers[number], sizes[number]), path);
    }
    if (count > 1)
        check(ort.add_external_initializers_from_files_in_memory(options, names + 1, buffers + 1, sizes + 1, count - 1),
              EXIT_MODEL, path);
    check(ort.create_session_from_array(environment, buffers[0], sizes[0], options, session), EXIT_MODEL, path);
    for (size_t number = 0; number < count; number++)
        free(buffers[number]);
    free(sizes);
    free(buffers);
    free(names);
    ecz_close(container);
}

/* --- tensors --- */

static void read_tensor(const char *path, tensor *out)
{
    size_t size;
    uint8_t *data = read_file(path, &size, EXIT_DAMAGED);
    const char *problem = tensor_read(data, size, out);
    if (problem)
        fail(EXIT_DAMAGED, "write it with edgecompress bundle", "%s: %s", path, problem);
    free(data);
}

static ort_value *value_of(const tensor *from, const char *path)
{
    static ort_memory *memory;
    ort_value *value = NULL;
    if (!memory)
        check(ort.create_cpu_memory_info(ORT_DEVICE_ALLOCATOR, ORT_MEMORY_DEFAULT, &memory), EXIT_MACHINE, path);
    if (from->type == TENSOR_STRING) {
        void *allocator;
        check(ort.get_allocator_with_default_options(&allocator), EXIT_MACHINE, path);
        check(ort.create_tensor(allocator, from->shape, from->rank, from->type, &value), EXIT_MODEL, path);
        check(ort.fill_string_tensor(value, (const char *const *)from->texts, from->count), EXIT_MODEL, path);
    } else {
        size_t bytes = from->count * tensor_element_size(from->type);
        check(ort.create_tensor_with_data(memory, from->data, bytes, from->shape, from->rank, from->type, &value),
              EXIT_MODEL, path);
    }
    return value;
}

static void read_texts(ort_value *value, tensor *out)
{
    size_t bytes;
    check(ort.get_string_tensor_data_length(value, &bytes), EXIT_MODEL, "the output");
    char *all = allocate(bytes);
    size_t *offsets = allocate((out->count + 1) * sizeof *offsets);
    check(ort.get_string_tensor_content(value, all, bytes, offsets, out->count), EXIT_MODEL, "the output");
    offsets[out->count] = bytes;
    out->texts = allocate(out->count * sizeof *out->texts);
    for (size_t at = 0; at < out->count; at++) {
        size_t length = offsets[at + 1] - offsets[at];
        out->texts[at] = allocate(length + 1);
        memcpy(out->texts[at], all + offsets[at], length);
        out->texts[at][length] = 0;
    }
    free(offsets);
    free(all);
}

/* Copy what an output is. */
static void tensor_of(ort_value *value, const char *name, tensor *out)
{
    ort_info *info;
    int yes;
    memset(out, 0, sizeof *out);
    check(ort.is_tensor(value, &yes), EXIT_MODEL, name);
    if (!yes)
        fail(EXIT_WRONG, "", "wrong outputs: '%s' is no tensor", name);
    check(ort.get_tensor_type_and_shape(value, &info), EXIT_MODEL, name);
    check(ort.get_tensor_element_type(info, &out->type), EXIT_MODEL, name);
    check(ort.get_dimensions_count(info, &out->rank), EXIT_MODEL, name);
    if (out->rank > TENSOR_MAX_RANK)
        fail(EXIT_WRONG, "", "wrong outputs: '%s' has %lu dimensions", name, (unsigned long)out->rank);
    check(ort.get_dimensions(info, out->shape, out->rank), EXIT_MODEL, name);
    ort.release_info(info);
    out->count = 1;
    for (size_t axis = 0; axis < out->rank; axis++)
        out->count *= (size_t)out->shape[axis];
    if (out->type == TENSOR_STRING) {
        read_texts(value, out);
        return;
    }
    void *data;
    size_t bytes = out->count * tensor_element_size(out->type);
    check(ort.get_tensor_data(value, &data), EXIT_MODEL, name);
    out->data = allocate(bytes);
    if (bytes) /* else there may be no data at all */
        memcpy(out->data, data, bytes);
}

/* --- models --- */

/* Open the session; init_ms is the time for reading, decoding and preparing it. */
static void open_session(model *which, int threads)
{
    static const uint8_t signature[8] = {0x89, 'E', 'C', 'Z', '\r', '\n', 0x1A, '\n'};
    ort_options *options;
    const char *path = which->path;
    uint8_t head[sizeof signature] = {0};
    double start = now_ms();
    FILE *file = fopen(path, "rb");
    if (!file)
        fail(EXIT_MODEL, "check the path", "cannot read %s", path);
    size_t got = fread(head, 1, sizeof head, file);
    fclose(file);
    check(ort.create_session_options(&options), EXIT_MACHINE, path);
    check(ort.set_session_log_severity_level(options, ORT_LOG_FATAL), EXIT_MACHINE, path);
    check(ort.set_intra_op_num_threads(options, threads), EXIT_MACHINE, path);
    check(ort.set_inter_op_num_threads(options, 1), EXIT_MACHINE, path);
    if (got == sizeof head && !memcmp(head, signature, sizeof head)) {
        size_t size;
        uint8_t *data = read_file(path, &size, EXIT_MODEL);
        open_container(path, data, size, options, &which->loaded->session);
        free(data);
    } else {
        check(ort.create_session(environment, path, options, &which->loaded->session), EXIT_MODEL, path);
    }
    ort.release_session_options(options);
    which->init_ms = now_ms() - start;
}

void load_model(model *which, int threads)
{
    struct loaded *made = which->loaded = allocate(sizeof *made);
    made->inputs = allocate(which->input_count * sizeof *made->inputs);
    made->values = allocate(which->input_count * sizeof *made->values);
    made->input_names = allocate(which->input_count * sizeof *made->input_names);
    made->expected = allocate(which->output_count * sizeof *made->expected);
    made->outputs = allocate(which->output_count * sizeof *made->outputs);
    made->output_names = allocate(which->output_count * sizeof *made->output_names);
    memset(made->outputs, 0, which->output_count * sizeof *made->outputs);
    for (size_t at = 0; at < which->input_count; at++) {
        read_tensor(which->inputs[at], &made->inputs[at]);
        made->values[at] = value_of(&made->inputs[at], which->inputs[at]);
        made->input_names[at] = made->inputs[at].name;
    }
    for (size_t at = 0; at < which->output_count; at++) {
        read_tensor(which->outputs[at], &made->expected[at]);
        made->output_names[at] = made->expected[at].name;
    }
    open_session(which, threads);
}

double run_model(model *which)
{
    struct loaded *of = which->loaded;
    for (size_t at = 0; at < which->output_count; at++) {
        if (of->outputs[at])
            ort.release_value(of->outputs[at]);
        of->outputs[at] = NULL;
    }
    double start = now_ms();
    ort_status *status =
        ort.run(of->session, NULL, of->input_names, (const ort_value *const *)of->values, which->input_count,
                of->output_names, which->output_count, of->outputs);
    double taken = now_ms() - start;
    check(status, EXIT_MODEL, which->path);
    return taken;
}

void check_outputs(const model *which)
{
    const struct loaded *of = which->loaded;
    for (size_t at = 0; at < which->output_count; at++) {
        tensor actual;
        char problem[160];
        tensor_of(of->outputs[at], of->output_names[at], &actual);
        if (tensor_difference(&actual, &of->expected[at], which->tolerance, problem, sizeof problem))
            fail(EXIT_WRONG, "this processor or build of the runtime computes differently: do not use the bundle here",
                 "wrong outputs: '%s' %s", of->output_names[at], problem);
        tensor_free(&actual);
    }
}
