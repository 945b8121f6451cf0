/* The entries of ONNX Runtime's C API that the bench runner calls, by their place in its table of functions.
 *
 * The runtime promises that its table only ever grows at the end, so a place stays what it is. Without the runtime's
 * header there is nothing to install in order to build the runner, and one program serves any version from 1.18 on.
 */
#ifndef ORT_TABLE_H
#define ORT_TABLE_H

#include <stddef.h>
#include <stdint.h>

/* The oldest version of the table that has all entries below (that of ONNX Runtime 1.18). */
enum { ORT_TABLE_VERSION = 18 };

enum { ORT_LOG_FATAL = 4, ORT_DEVICE_ALLOCATOR = 0, ORT_MEMORY_DEFAULT = 0 };

typedef struct ort_status ort_status;
typedef struct ort_env ort_env;
typedef struct ort_options ort_options;
typedef struct ort_session ort_session;
typedef struct ort_value ort_value;
typedef struct ort_memory ort_memory;
typedef struct ort_info ort_info;

/* What the one exported function, OrtGetApiBase, returns. */
typedef struct {
    const void *(*get_table)(uint32_t version); /* NULL where the library has no such version */
    const char *(*get_version)(void);
} ort_base;

/* ENTRY(place in the table, type returned, name, parameters); a status is NULL for success. Texts are const char *. */
#define ORT_ENTRIES(ENTRY) \
    ENTRY(2, const char *, get_error_message, (const ort_status *)) \
    ENTRY(3, ort_status *, create_env, (int level, const char *id, ort_env **)) \
    ENTRY(6, ort_status *, disable_telemetry_events, (const ort_env *)) \
    ENTRY(7, ort_status *, create_session, (const ort_env *, const char *path, const ort_options *, ort_session **)) \
    ENTRY(8, ort_status *, create_session_from_array, \
          (const ort_env *, const void *model, size_t size, const ort_options *, ort_session **)) \
    ENTRY(9, ort_status *, run, \
          (ort_session *, const void *run_options, const char *const *input_names, const ort_value *const *inputs, \
           size_t input_count, const char *const *output_names, size_t output_count, ort_value **outputs)) \
    ENTRY(10, ort_status *, create_session_options, (ort_options **)) \
    ENTRY(22, ort_status *, set_session_log_severity_level, (ort_options *, int level)) \
    ENTRY(24, ort_status *, set_intra_op_num_threads, (ort_options *, int threads)) \
    ENTRY(25, ort_status *, set_inter_op_num_threads, (ort_options *, int threads)) \
    ENTRY(48, ort_status *, create_tensor, \
          (void *allocator, const int64_t *shape, size_t rank, int type, ort_value **)) \
    ENTRY(49, ort_status *, create_tensor_with_data, \
          (const ort_memory *, void *data, size_t size, const int64_t *shape, size_t rank, int type, ort_value **)) \
    ENTRY(50, ort_status *, is_tensor, (const ort_value *, int *yes)) \
    ENTRY(51, ort_status *, get_tensor_data, (ort_value *, void **data)) \
    ENTRY(52, ort_status *, fill_string_tensor, (ort_value *, const char *const *texts, size_t count)) \
    ENTRY(53, ort_status *, get_string_tensor_data_length, (const ort_value *, size_t *size)) \
    ENTRY(54, ort_status *, get_string_tensor_content, \
          (const ort_value *, void *texts, size_t size, size_t *offsets, size_t count)) \
    ENTRY(60, ort_status *, get_tensor_element_type, (const ort_info *, int *type)) \
    ENTRY(61, ort_status *, get_dimensions_count, (const ort_info *, size_t *rank)) \
    ENTRY(62, ort_status *, get_dimensions, (const ort_info *, int64_t *shape, size_t rank)) \
    ENTRY(65, ort_status *, get_tensor_type_and_shape, (const ort_value *, ort_info **)) \
    ENTRY(69, ort_status *, create_cpu_memory_info, (int allocator, int memory, ort_memory **)) \
    ENTRY(78, ort_status *, get_allocator_with_default_options, (void **allocator)) \
    ENTRY(93, void, release_status, (ort_status *)) \
    ENTRY(96, void, release_value, (ort_value *)) \
    ENTRY(99, void, release_info, (ort_info *)) \
    ENTRY(100, void, release_session_options, (ort_options *)) \
    ENTRY(279, ort_status *, add_external_initializers_from_files_in_memory, \
          (ort_options *, const char *const *names, char *const *buffers, const size_t *sizes, size_t count))

#define ORT_POINTER(place, result, name, parameters) result(*name) parameters;

typedef struct {
    ORT_ENTRIES(ORT_POINTER)
} ort_table;

#undef ORT_POINTER

/* Fill table from what get_table returned. */
static inline void ort_read_table(ort_table *table, const void *source)
{
    void (*const *functions)(void) = (void (*const *)(void))source;
#define ORT_COPY(place, result, name, parameters) table->name = (result(*) parameters)functions[place];
    ORT_ENTRIES(ORT_COPY)
#undef ORT_COPY
}

#endif
