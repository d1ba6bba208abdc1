-- What goes on when an execution continues as new. Additive: programs of the schema before go on.

-- first_seq: behind which item the present life of its execution begins. A handler counts its items from there; readers are told
-- numbers that grow through all lives.
alter table @schema@._private_channels
    add column first_seq bigint not null default 0,
    add constraint life check (0 <= first_seq and first_seq <= last_seq);
