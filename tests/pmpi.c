/* A layer between a program and MPI that counts what each rank hands over; loaded by LD_PRELOAD, in tests/test_traffic.py.
 *
 * counts[kind][0] are messages and counts[kind][1] bytes, by these kinds: */
#include <mpi.h>
#include <string.h>

enum { EACH, REDUCED, GATHERED, BROADCAST, ONE, KINDS };
long long counts[KINDS][2];

void reset_counts(void) { memset(counts, 0, sizeof counts); }

static void add(int kind, long long messages, long long bytes) {
    counts[kind][0] += messages;
    counts[kind][1] += bytes;
}

static long long size_of(MPI_Datatype type) {
    MPI_Count size;
    PMPI_Type_size_x(type, &size);
    return size;
}

#define PIECES(comm, count, type)                                        \
    int rank, size, other;                                               \
    PMPI_Comm_rank(comm, &rank);                                         \
    PMPI_Comm_size(comm, &size);                                         \
    for (other = 0; other < size; other++)                               \
        if (other != rank && (count) > 0 && size_of(type) > 0) add(EACH, 1, (count) * size_of(type));

#define ALL(name, integer, places)                                                                                  \
    int MPI_Alltoallv##name(const void *a, const integer n[], const places d[], MPI_Datatype s, void *b,             \
                            const integer m[], const places e[], MPI_Datatype r, MPI_Comm comm) {                    \
        PIECES(comm, n[other], s)                                                                                    \
        return PMPI_Alltoallv##name(a, n, d, s, b, m, e, r, comm);                                                   \
    }                                                                                                                \
    int MPI_Alltoall##name(const void *a, integer n, MPI_Datatype s, void *b, integer m, MPI_Datatype r,             \
                           MPI_Comm comm) {                                                                          \
        PIECES(comm, n, s)                                                                                           \
        return PMPI_Alltoall##name(a, n, s, b, m, r, comm);                                                          \
    }                                                                                                                \
    int MPI_Allreduce##name(const void *a, void *b, integer n, MPI_Datatype s, MPI_Op op, MPI_Comm comm) {           \
        add(REDUCED, 1, n * size_of(s));                                                                             \
        return PMPI_Allreduce##name(a, b, n, s, op, comm);                                                           \
    }                                                                                                                \
    int MPI_Iallreduce##name(const void *a, void *b, integer n, MPI_Datatype s, MPI_Op op, MPI_Comm comm,            \
                             MPI_Request *request) {                                                                 \
        add(REDUCED, 1, n * size_of(s));                                                                             \
        return PMPI_Iallreduce##name(a, b, n, s, op, comm, request);                                                 \
    }                                                                                                                \
    int MPI_Allgather##name(const void *a, integer n, MPI_Datatype s, void *b, integer m, MPI_Datatype r,            \
                            MPI_Comm comm) {                                                                         \
        add(GATHERED, 1, n * size_of(s));                                                                            \
        return PMPI_Allgather##name(a, n, s, b, m, r, comm);                                                         \
    }                                                                                                                \
    int MPI_Allgatherv##name(const void *a, integer n, MPI_Datatype s, void *b, const integer m[],                   \
                             const places e[], MPI_Datatype r, MPI_Comm comm) {                                      \
        add(GATHERED, 1, n * size_of(s));                                                                            \
        return PMPI_Allgatherv##name(a, n, s, b, m, e, r, comm);                                                     \
    }                                                                                                                \
    int MPI_Bcast##name(void *a, integer n, MPI_Datatype s, int root, MPI_Comm comm) {                               \
        int rank;                                                                                                    \
        PMPI_Comm_rank(comm, &rank);                                                                                 \
        if (rank == root) add(BROADCAST, 1, n * size_of(s));                                                         \
        return PMPI_Bcast##name(a, n, s, root, comm);                                                                \
    }                                                                                                                \
    int MPI_Send##name(const void *a, integer n, MPI_Datatype s, int to, int tag, MPI_Comm comm) {                   \
        add(ONE, 1, n * size_of(s));                                                                                 \
        return PMPI_Send##name(a, n, s, to, tag, comm);                                                              \
    }                                                                                                                \
    int MPI_Isend##name(const void *a, integer n, MPI_Datatype s, int to, int tag, MPI_Comm comm,                    \
                        MPI_Request *request) {                                                                      \
        if (to >= 0) add(ONE, 1, n * size_of(s));                                                                    \
        return PMPI_Isend##name(a, n, s, to, tag, comm, request);                                                    \
    }                                                                                                                \
    int MPI_Sendrecv##name(const void *a, integer n, MPI_Datatype s, int to, int tag, void *b, integer m,            \
                           MPI_Datatype r, int from, int tag2, MPI_Comm comm, MPI_Status *status) {                  \
        if (to >= 0) add(ONE, 1, n * size_of(s));                                                                    \
        return PMPI_Sendrecv##name(a, n, s, to, tag, b, m, r, from, tag2, comm, status);                             \
    }

ALL(, int, int)
#if MPI_VERSION >= 4
ALL(_c, MPI_Count, MPI_Aint)
#endif
